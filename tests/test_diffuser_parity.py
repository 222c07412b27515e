"""Diffuser's numbers (tests/parity/README.md)."""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import PARITY

from valdi_jax.config import PlanConfig
from valdi_jax.data.episode import Episode
from valdi_jax.data.replay import Replay
from valdi_jax.data.windows import prepared
from valdi_jax.diffusion import Guide, cosine_posterior, guided_sample, guided_step
from valdi_jax.losses.plans import look_at_plans, loss_weights, noise_plans, plan_loss
from valdi_jax.networks import scaler
from valdi_jax.networks.layers import apply
from valdi_jax.networks.unet import PlanValue, TemporalUNet
from valdi_jax.observation import Observation
from valdi_jax.presets import default_config

NUMBERS = dict(np.load(PARITY / "diffuser.npz", allow_pickle=False))
SHAPES = json.loads((PARITY / "diffuser_parameters.json").read_text())
# Plan length, actions, states, timesteps, multipliers, attention, weight of action 0.
CASES = {
    "locomotion": (32, 6, 11, 20, (1, 2, 4, 8), False, 10),
    "attention": (4, 6, 17, 20, (1, 4, 8), True, 10),
    "maze2d": (128, 2, 4, 64, (1, 4, 8), False, 1),
}


def drawn(key, shape):
    return np.random.RandomState(zlib.crc32(f"public:{key}".encode())).standard_normal(shape)


def tensor(network, name):
    """A tensor of the authors' network, by the rule of the README."""
    shape = SHAPES[network][name]
    values = drawn(f"{network}.{name}", shape)
    last = name.split(".")[-1]
    if last in ("bias", "b"):
        values = 0.1 * values
    elif last == "g" or len(shape) == 1:
        values = 1 + 0.1 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


RESIDUAL = {
    "blocks.0.block.0": "block_0/conv/linear",
    "blocks.0.block.2": "block_0/norm",
    "blocks.1.block.0": "block_1/conv/linear",
    "blocks.1.block.2": "block_1/norm",
    "time_mlp.1": "time",
    "residual_conv": "skip",
}


def path_of(name, network):
    """Where a tensor of theirs is in our parameters, and its last name."""
    *parts, last = name.split(".")
    attention = ".fn." in name
    if attention:
        module = name.split(".fn.")[0]
        inner = {"to_qkv": "qkv", "to_out": "outputs", "norm": "norm"}[parts[-1]]
        top = {"mid_attn": "middle_attention"}.get(module) or "{}_{}_attention".format(
            module.split(".")[0].removesuffix("s"), module.split(".")[1]
        )
        return f"{top}/{inner}", last
    if parts[0] == "time_mlp":
        return f"time/linear_{'01'[parts[1] == '3']}", last
    if parts[0] in ("final_conv", "final_block"):
        own = {"0.block.0": "output_block/conv/linear", "0.block.2": "output_block/norm"}
        value = {"0": "hidden", "2": "outputs"}
        rest = ".".join(parts[1:])
        chosen = (own | {"1": "outputs"}) if parts[0] == "final_conv" else value
        return chosen[rest], last
    if parts[0].startswith("mid_down"):
        return f"middle_conv_{int(parts[0][-1]) - 1}/linear", last
    if parts[0].startswith("mid_block"):
        top, rest = f"middle_block_{int(parts[0][-1]) - 1}", parts[1:]
    else:
        family = {"downs": "down", "ups": "up", "blocks": "level"}[parts[0]]
        level, index, rest = parts[1], parts[2], parts[3:]
        if rest == ["conv"]:
            return f"{family}_{level}_conv" + ("" if family == "up" else "/linear"), last
        top = f"{family}_{level}_block_{index}"
    return f"{top}/{RESIDUAL['.'.join(rest)]}", last


def put(tree, path, value):
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def parameters(network, tensors):
    """Our parameters from all tensors of one of their networks."""
    params = {}
    for name, value in tensors.items():
        path, last = path_of(name, network)
        if path.startswith("up_") and path.endswith("_conv"):
            if last == "bias":
                put(params, f"{path}/bias", value)
                continue
            kernel = np.moveaxis(value, 2, 0)  # [in, out, 4] -> [4, in, out]
            put(params, f"{path}/even", np.concatenate([kernel[3], kernel[1]]))
            put(params, f"{path}/odd", np.concatenate([kernel[2], kernel[0]]))
        elif path.endswith("norm"):
            names = {"weight": "scale", "g": "scale", "bias": "bias", "b": "bias"}
            put(params, f"{path}/{names[last]}", value.reshape(-1))
        elif last == "bias":
            put(params, f"{path}/dense/bias", value)
        else:
            if value.ndim == 3:  # [out, in, kernel] -> [kernel * in, out]
                value = value.transpose(2, 1, 0).reshape(-1, value.shape[0])
            else:
                value = value.T
            put(params, f"{path}/dense/kernel", value)
    return jax.tree.map(jnp.asarray, params)


def projections(network, gradients):
    """Norm and dot product of each of their tensors' gradients, from ours."""

    def build(probe):
        return {name: tensor_like(name, probe) for name in SHAPES[network]}

    def tensor_like(name, probe):
        shape = SHAPES[network][name]
        return drawn(f"probe:{network}.{name}", shape).astype(np.float32) if probe else shape

    placed = {name: parameters(network, {name: value}) for name, value in build(probe=True).items()}
    norms, dots = {}, {}
    for name, part in placed.items():
        ours = jax.tree_util.tree_map_with_path(
            lambda path, _: functools.reduce(lambda tree, key: tree[key.key], path, gradients), part
        )
        norms[name] = float(optax.tree.norm(ours))
        dots[name] = float(optax.tree.vdot(ours, part))
    return norms, dots


@functools.cache
def network(case, kind):
    """The network and the parameters of a case."""
    *_, multipliers, attention, _ = CASES[case]
    module = TemporalUNet(multipliers, attention) if kind == "unet" else PlanValue(multipliers)
    name = f"{case}.{kind}"
    return module, parameters(name, {n: tensor(name, n) for n in SHAPES[name]})


def close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@functools.cache
def batch(case):
    """Clean plans, noise, timesteps, and the mask of what is pinned."""
    length, actions, states, *_ = CASES[case]
    mask = np.zeros((length, actions + states), bool)
    mask[0, actions:] = True
    mask[-1, actions:] |= case == "maze2d"
    numbers = (NUMBERS[f"{case}/{name}"] for name in ("x0", "eps", "t"))
    clean, noise, timesteps = numbers
    return clean, noise, timesteps.astype(np.int32), mask


each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_schedule(case):
    posterior = cosine_posterior(CASES[case][3])
    names = {
        "alphas_cumprod": posterior.alpha_bars,
        "posterior_variance": posterior.variance,
        "posterior_mean_coef1": posterior.clean,
        "posterior_mean_coef2": posterior.noised,
    }
    for name, ours in names.items():
        np.testing.assert_allclose(ours, NUMBERS[f"{case}/schedule/{name}"], atol=1e-6, rtol=1e-5)


NETWORKS = [
    (case, kind)
    for case in CASES
    for kind in ("unet", "value")
    if (case, kind) != ("maze2d", "value")
]
SLOW = [
    ("locomotion", "unet"),
    ("attention", "value"),
    ("maze2d", "unet"),
]  # the others hold every kind of layer


def marked(names):
    return [pytest.param(*n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


each_network = pytest.mark.parametrize(("case", "kind"), marked(NETWORKS))


@each_network
def test_networks_have_the_authors_parameters(case, kind):
    module, params = network(case, kind)
    length, actions, states, *_ = CASES[case]
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, length, actions + states)), jnp.zeros(1)
    )["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


@functools.cache
def results(case, kind):
    """Loss, output, gradients, and what five updates do, from one compiled program."""
    module, params = network(case, kind)
    _, actions, _, timesteps_in_all, *_, weight = CASES[case]
    clean, noise, timesteps, mask = batch(case)
    posterior = cosine_posterior(timesteps_in_all)
    weights = loss_weights(
        *clean.shape[1:2], actions, clean.shape[2] - actions, action_weight=weight
    )

    def output(params):
        return apply(module, params, NUMBERS[f"{case}/x_noisy"], timesteps)

    def loss(params):
        def predict(plans, timesteps):
            return apply(module, params, plans, timesteps)

        if kind == "unet":
            return plan_loss(
                predict, clean, timesteps, noise, mask, posterior=posterior, weights=weights[None]
            )
        noised = noise_plans(clean, timesteps, noise, mask, posterior=posterior)
        return jnp.mean((predict(noised, timesteps) - NUMBERS[f"{case}/value_target"][:, 0]) ** 2)

    optimizer = optax.adam(2e-4)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return value, gradients, optax.apply_updates(params, updates), state

    first, history, state = None, [], optimizer.init(params)
    after = params
    for _ in range(5):
        value, gradients, after, state = step(after, state)
        first = gradients if first is None else first
        history.append(float(value))
    output = jax.jit(output)
    return {
        "output": output(params),
        "loss": history[0],
        "gradients": first,
        "history": history,
        "after": output(after),
    }


@each_case
def test_noised_plans(case):
    clean, noise, timesteps, mask = batch(case)
    posterior = cosine_posterior(CASES[case][3])
    close(
        noise_plans(clean, timesteps, noise, mask, posterior=posterior),
        NUMBERS[f"{case}/x_noisy"],
    )


@each_case
def test_loss_weights(case):
    length, actions, states, *_, weight = CASES[case]
    ours = loss_weights(length, actions, states, action_weight=weight)
    np.testing.assert_allclose(ours, NUMBERS[f"{case}/loss_weights"])
    if case != "attention":
        discounted = loss_weights(
            *(length, actions, states),
            action_weight=weight,
            discount=0.9,
        )
        discounted[:, actions + 1] *= 3  # the one state that theirs weigh more
        np.testing.assert_allclose(discounted, NUMBERS[f"{case}/l1_discounted_weights"], rtol=1e-5)


@each_network
def test_outputs_and_losses(case, kind):
    ours = results(case, kind)
    names = {"unet": ("unet", "loss"), "value": ("value", "value_loss")}[kind]
    theirs = NUMBERS[f"{case}/{names[0]}"]
    close(ours["output"], theirs[:, 0] if kind == "value" else theirs)
    close(ours["loss"], NUMBERS[f"{case}/{names[1]}"])


@pytest.mark.parametrize("case", ["locomotion", "maze2d"])
def test_the_posterior_of_a_predicted_noise(case):
    _, _, timesteps, _ = batch(case)
    at = jax.tree.map(lambda x: x[timesteps][:, None, None], cosine_posterior(CASES[case][3]))
    predicted, noised = NUMBERS[f"{case}/unet"], NUMBERS[f"{case}/x_noisy"]
    clean = (noised - np.sqrt(1 - at.alpha_bars) * predicted) / np.sqrt(at.alpha_bars)
    clean = np.clip(clean, -1, 1) if case == "maze2d" else clean
    close(at.clean * clean + at.noised * noised, NUMBERS[f"{case}/eps_posterior_mean"])


@each_network
def test_gradients(case, kind):
    gradients = results(case, kind)["gradients"]
    norms, dots = projections(f"{case}.{kind}", gradients)
    names = NUMBERS[f"{case}/{kind}/grad_names"].tolist()
    assert set(names) == set(norms)
    close(np.array([norms[name] for name in names]), NUMBERS[f"{case}/{kind}/grad_norms"], 1e-4)
    close(np.array([dots[name] for name in names]), NUMBERS[f"{case}/{kind}/grad_dots"], 1e-4)


@pytest.mark.parametrize(("case", "kind"), marked([n for n in NETWORKS if n[0] != "attention"]))
def test_five_updates(case, kind):
    ours, prefix = results(case, kind), "value_" if kind == "value" else ""
    close(ours["history"], NUMBERS[f"{case}/{prefix}update_history"], 1e-4)
    theirs = NUMBERS[f"{case}/{kind}_after_5_updates"]
    close(ours["after"], theirs[:, 0] if kind == "value" else theirs, 1e-4)


def sampler(case):
    """The arguments of the authors' sampling chain."""
    length, actions, states, timesteps, *_ = CASES[case]
    module, params = network(case, "unet")
    mask = batch(case)[3]
    known = np.zeros((length, actions + states), np.float32)
    known[0, actions:] = NUMBERS[f"{case}/sample/start"]
    if case == "maze2d":
        known[-1, actions:] = NUMBERS[f"{case}/sample/goal"]
    posterior = cosine_posterior(timesteps)

    def denoise(plans, timestep):
        clean = apply(module, params, plans, jnp.broadcast_to(timestep, plans.shape[:1]))
        return jnp.clip(clean, -1, 1) if case == "maze2d" else clean

    def pin(plans):
        return jnp.where(mask, known, plans)

    count = NUMBERS[f"{case}/sample/chain"].shape[1]
    noise = drawn(f"{case}.noise", (timesteps + 1, count, length, actions + states))
    return denoise, noise.astype(np.float32), pin, posterior


def guide(case):
    module, params = network(case, "value")

    def value(plans, timestep):
        return apply(module, params, plans, jnp.broadcast_to(timestep, plans.shape[:1]))

    scale, stop = {"locomotion": (0.1, 2), "attention": (0.001, 4)}[case]
    return Guide(value, scale, steps=2, stop=stop)


@pytest.mark.parametrize("case", [pytest.param("locomotion", marks=pytest.mark.slow), "attention"])
def test_guided_chain(case):
    denoise, noise, pin, posterior = sampler(case)
    settings = {"posterior": posterior, "guide": guide(case)}

    @jax.jit
    def chain(noise):
        def step(plans, inputs):
            after = guided_step(denoise, plans, *inputs, pin, **settings)
            return after[0], after

        timesteps = jnp.arange(len(noise) - 2, -1, -1)
        return jax.lax.scan(step, pin(noise[0]), (timesteps, noise[1:]))[1]

    plans, values = chain(noise)
    close(plans, NUMBERS[f"{case}/sample/chain"][1:])
    close(values, NUMBERS[f"{case}/sample/values_each"])


@pytest.mark.parametrize("case", ["locomotion", "attention"])
def test_unguided_plans(case):
    denoise, noise, pin, posterior = sampler(case)
    plans, _ = jax.jit(functools.partial(guided_sample, denoise, pin=pin, posterior=posterior))(
        noise
    )
    close(plans, NUMBERS[f"{case}/sample/unguided"])


def test_guided_plans():
    denoise, noise, pin, posterior = sampler("attention")
    sample = functools.partial(
        guided_sample, denoise, pin=pin, posterior=posterior, guide=guide("attention")
    )
    plans, values = jax.jit(sample)(noise)
    order = np.argsort(-values)
    close(values[order], NUMBERS["attention/sample/values"])
    close(plans[order], NUMBERS["attention/sample/trajectories"])


def test_inpainted_plan():
    denoise, noise, pin, posterior = sampler("maze2d")
    plans, _ = jax.jit(functools.partial(guided_sample, denoise, pin=pin, posterior=posterior))(
        noise
    )
    close(plans, NUMBERS["maze2d/sample/trajectories"])


def windows(padding):
    """A replay buffer of the reference's three episodes, and the plans of all its windows."""
    states, actions = (
        raw_states()[:123],
        np.tanh(drawn("locomotion.raw_actions", (500, 6)).astype(np.float32))[:123],
    )
    config = default_config("pendulum", "diffuser").replace(
        env={"max_steps": 64},
        model={"action_dim": 6, "state_dim": 11},
        learn={"plan": PlanConfig(padding=padding)},
    )
    replay, start = Replay(config), 0
    for length in NUMBERS["dataset/lengths"]:
        rows = slice(start, start + length)
        last = states[rows][-1:]  # after the last action: their data do not hold it
        replay.give(
            prepared(
                Episode(
                    observations=Observation(vector=np.concatenate([states[rows], last])),
                    actions=actions[rows],
                    rewards=NUMBERS["dataset/rewards"][rows],
                    terminated=start + length - 1 in NUMBERS["dataset/terminal_at"],
                    truncated=False,
                    seed=0,
                ),
                config=config,
            )
        )
        start += length
    scalers = {"states": scaler.fit("gaussian", states), "actions": scaler.fit("gaussian", actions)}
    drawn_segments = replay.draw(np.random.default_rng(0), 5000)
    found = np.stack([drawn_segments.slots, drawn_segments.steps[:, 0]], axis=1)
    found, first = np.unique(found, axis=0, return_index=True)
    segments = jax.tree.map(lambda x: x[first], drawn_segments)
    view = look_at_plans({"scalers": scalers}, replay.gather(segments), config=config)
    return found, view


def test_windows():
    indices, view = windows(padding=True)
    np.testing.assert_array_equal(indices, NUMBERS["dataset/indices"][:, :2])
    close(view.returns, NUMBERS["dataset/values"])
    close(view.plans[-1], NUMBERS["dataset/last_window"])
    close(view.plans[-1, 0, 6:], NUMBERS["dataset/last_condition"])
    unpadded, _ = windows(padding=False)
    np.testing.assert_array_equal(unpadded, NUMBERS["dataset/indices_without_padding"][:, :2])


def raw_states():
    states = drawn("locomotion.raw_observations", (500, 11)).astype(np.float32)
    return states * np.linspace(0.5, 5, 11, dtype=np.float32) + np.linspace(
        -3, 3, 11, dtype=np.float32
    )


def test_policy():
    actions = np.tanh(drawn("locomotion.raw_actions", (500, 6)).astype(np.float32))
    plan = NUMBERS["locomotion/sample/trajectories"][0]
    for name, data, part, theirs in [
        ("action", actions, plan[0, :6], NUMBERS["policy/action"]),
        ("observation", raw_states(), plan[:, 6:], NUMBERS["policy/observations"]),
    ]:
        fitted = scaler.fit("gaussian", data)
        close(fitted["center"], NUMBERS[f"policy/{name}_mean"])
        close(fitted["scale"], NUMBERS[f"policy/{name}_std"])
        close(scaler.unscale(fitted, part, kind="gaussian"), theirs)


@pytest.mark.parametrize("kind", ["limits", "safe-limits", "cdf"])
def test_normalisers(kind):
    states = raw_states()
    if kind == "safe-limits":
        states[:, 3] = 2.0
    fitted = scaler.fit(kind, states)
    name = kind.removesuffix("-limits")
    close(scaler.scale(fitted, states[:16], kind=kind), NUMBERS[f"normaliser/{name}_normalised"])
    if kind == "safe-limits":
        return
    probe = NUMBERS["normaliser/probe"]
    if kind == "cdf":
        probe = np.clip(probe, -1, 1)
    close(scaler.unscale(fitted, probe, kind=kind), NUMBERS[f"normaliser/{name}_unnormalised"])
