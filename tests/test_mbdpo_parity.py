"""MBDPO's numbers, on TD-MPC2's world model (tests/parity/README.md)."""

import dataclasses
import functools
import json
import zlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PARITY

from valdi_jax import losses, model
from valdi_jax.config import Config, PlannerConfig
from valdi_jax.losses import energy, objective, policy, q
from valdi_jax.losses.value import td_targets
from valdi_jax.networks.twohot import decode, two_hot
from valdi_jax.observation import Observation
from valdi_jax.planners import mbdpo, propose_chunks
from valdi_jax.planners.base import Problem, clip, shift
from valdi_jax.planners.scoring import TailDraws, end_value, predicted_return
from valdi_jax.types import Batch
from valdi_jax.updates import _first_state, apply_update

HORIZON, BATCH, ACTIONS = 3, 4, 6
CONFIG = Config().replace(
    model={
        "encoder": "simplex",
        "dynamics": "simplex",
        "networks": ("q", "policy", "energy"),
        "horizon": HORIZON,
        "chunk": 1,
        "action_dim": ACTIONS,
        "latent_dim": 64,
        "encoder_width": 64,
        "mlp_width": 64,
        "reward_width": 64,
        "value_width": 64,
        "policy_width": 64,
        "value_heads": 5,
        "bins": 101,
        "rho": 0.5,
    },
    learn={
        "terms": ("dynamics", "reward", "q", "energy", "policy"),
        "diffusion_weight": 20.0,
        "reward_weight": 0.1,
        "value_weight": 0.1,
        "max_grad_norm": 20.0,
        "encoder_rate": 0.3,
        "ema_rate": 0.01,
        "target_encoder": "online",
        "last_step": False,
        "bootstrap_terminal": False,
    },
)
ASIS = CONFIG.replace(
    learn={"energy": dataclasses.replace(CONFIG.learn.energy, aligned=False)},
)
NETWORKS = {
    "_encoder": "encoder",
    "_dynamics": "dynamics",
    "_reward": "reward",
    "_pi": "policy",
    "_F": "energy",
    "_Qs": "q",
}
LAST = {"_encoder": "1"}  # the layer that answers, if not 2
TENSORS = {
    "weight": ("dense", "kernel"),
    "bias": ("dense", "bias"),
    "ln.weight": ("norm", "scale"),
    "ln.bias": ("norm", "bias"),
}


def place(name):
    """Where a tensor is in our parameters: the path, and whether it is a transposed matrix."""
    network, _, rest = name.replace(".state.", ".").partition(".")
    layer, _, tensor = rest.partition(".")
    last = layer == LAST.get(network, "2")
    path = (NETWORKS[network], "outputs" if last else f"block_{layer}")
    normed = not last or network in ("_encoder", "_dynamics")
    module, leaf = TENSORS[tensor]
    return (*path, *((module, leaf) if normed else (leaf,))), tensor == "weight"


def drawn(name, shape):
    draw = np.random.RandomState(zlib.crc32(f"public:{name}".encode())).standard_normal(shape)
    if name.endswith("bias"):
        draw = 0.1 * draw
    elif name.endswith("ln.weight"):
        draw = 1 + 0.1 * draw
    else:
        draw = draw / np.sqrt(shape[-1])
    return draw.astype(np.float32)


def build(prefix=""):
    shapes = json.loads((PARITY / "mbdpo_parameters.json").read_text())
    params = {}
    for name, shape in shapes.items():
        path, matrix = place(name)
        value = drawn(prefix + name, tuple(shape))
        tree = params
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
        tree[path[-1]] = jnp.asarray(value.swapaxes(-1, -2) if matrix else value)
    ones, zeros = jnp.ones(()), jnp.zeros(())
    statistics = {"q_range": ones, "energy_mean": zeros, "energy_std": ones}
    return params | {"statistics": statistics}


def pick(tree, name):
    """One of our tensors in the authors' layout."""
    path, matrix = place(name)
    value = np.asarray(functools.reduce(lambda t, key: t[key], path, tree))
    return value.swapaxes(-1, -2) if matrix else value


def batch_first(x):
    return jnp.asarray(np.swapaxes(x, 0, 1))


@pytest.fixture(scope="module")
def ref():
    with np.load(PARITY / "mbdpo.npz", allow_pickle=False) as file:
        numbers = dict(file)
    params = build()
    # Only the critics have target copies; the rest is not looked at.
    ema = params | {"q": build("target:")["q"]}
    last = np.zeros_like(numbers["action"][:1])  # a segment ends with a chunk that nothing uses

    def rows(key):  # negatives are stored time-major
        return batch_first(numbers[key].reshape(HORIZON, BATCH, ACTIONS))

    obs = np.concatenate([numbers["obs"], numbers["obs"][-1:]])
    batch = Batch(
        observations=Observation(image=None, vector=batch_first(obs)),
        actions=batch_first(np.concatenate([numbers["action"], last])),
        rewards=batch_first(np.concatenate([numbers["reward"], last[..., :1]])),
        terminals=batch_first(np.concatenate([numbers["terminated"], last[..., :1]])[..., 0]),
    )
    td_noise = batch_first(np.concatenate([numbers["td_eps"], last]))
    draws = {
        "dynamics": None,
        "q": q.QDraws(td_noise, jnp.array([0, 1]), jax.random.key(0)),
        "energy": energy.EnergyDraws(rows("neg_pi_eps"), rows("neg_noise"), rows("neg_uniform")),
        "policy": policy.PolicyDraws(
            batch_first(numbers["actor_eps"]), jnp.asarray(numbers["actor_pair"])
        ),
    }
    return SimpleNamespace(n=numbers, params=params, ema=ema, batch=batch, draws=draws)


@pytest.fixture
def _whole_segments(monkeypatch):
    """Train beyond terminal steps, as the authors' batch does."""
    monkeypatch.setattr(losses, "before_end", jnp.ones_like)


def close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    scale = max(np.abs(theirs).max(), 1e-8)
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=tolerance, rtol=0)


def test_forward_passes(ref):
    n, params = ref.n, ref.params
    z = model.encode(params, Observation(None, jnp.asarray(n["obs"])), config=CONFIG)
    close(z, n["latent"])
    z, action = jnp.asarray(n["latent"][:3]), jnp.asarray(n["action"])
    step = model.imagine_step(params["dynamics"], z, action, config=CONFIG.model)
    close(step, n["next_latent"])
    close(model.reward_output(params, z, action, config=CONFIG), n["reward_logits"])
    close(model.reward(params, z, action, config=CONFIG), n["reward_pred"][..., 0])
    close(model.q_outputs(params, z, action, config=CONFIG), n["q_logits"])
    close(model.q_values(params, z, action, config=CONFIG), n["q_values"][..., 0])
    close(model.q_values(ref.ema, z, action, config=CONFIG), n["target_q_values"][..., 0])
    close(model.energy(params, z, action, config=CONFIG), n["energy_logits"][..., 0])
    close(two_hot(jnp.asarray(n["two_hot_in"][:, 0]), 101), n["two_hot"])
    whole = model.policy(params, jnp.asarray(n["latent"]), jnp.asarray(n["pi_eps"]), config=CONFIG)
    close(whole.action, n["pi_action"])
    close(jnp.tanh(whole.mean), n["pi_mean"])
    close(whole.log_std, n["pi_log_std"])
    close(whole.entropy, n["pi_entropy"][..., 0])
    close(whole.scaled_entropy, n["pi_scaled_entropy"][..., 0])


def test_the_td_target(ref):
    n = ref.n
    z = jnp.asarray(n["latent"][1:])
    action = model.policy(ref.params, z, jnp.asarray(n["td_eps"]), config=CONFIG).action
    following = model.q_values(ref.ema, z, action, config=CONFIG)[:2].min(axis=0)
    target = td_targets(
        batch_first(n["reward"]),
        following.T,
        batch_first(n["terminated"][..., 0]),
        discount=float(n["discount"]),
    )
    close(target.T, n["td_target"][..., 0])


@pytest.mark.parametrize(("pairing", "config"), [("asis", ASIS), ("aligned", CONFIG)])
def test_the_energy(ref, pairing, config):
    n, horizon = ref.n, CONFIG.model.horizon
    latent = batch_first(n["latent"])
    view = SimpleNamespace(
        trajectory=latent, actions=ref.batch.actions, valid=jnp.ones((BATCH, horizon + 1))
    )

    def loss(net):
        params = ref.params | {"energy": net}
        return energy.loss(params, ref.ema, view, ref.draws["energy"], config=config)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(ref.params["energy"])
    close(value, n[f"energy_{pairing}_loss"])
    close(metrics["energy/replayed"], n[f"energy_{pairing}_positive_logits"].mean())
    close(metrics["energy/negative"], n[f"energy_{pairing}_negative_logits"].mean())
    close(metrics["energy/random"], n[f"energy_{pairing}_candidate_logits"][:, 2].mean(), 1e-4)
    norms = [np.linalg.norm(pick({"energy": grads}, name)) for name in n["energy_grad_keys"]]
    close(norms, n[f"energy_{pairing}_grad_norms"], 1e-4)
    moved = energy.track(ref.params["statistics"], metrics, config=config)
    close(moved["energy_mean"], n[f"energy_{pairing}_ema_mean"][0])
    close(moved["energy_std"], n[f"energy_{pairing}_ema_std"][0])


@pytest.mark.usefixtures("_whole_segments")
def test_losses_and_gradients(ref):
    n = ref.n
    gradient = jax.jit(jax.value_and_grad(objective, has_aux=True), static_argnames="config")
    (total, metrics), grads = gradient(ref.params, ref.ema, ref.batch, ref.draws, config=ASIS)
    for ours, theirs in (
        ("dynamics", "consistency"),
        ("reward", "reward"),
        ("q", "value"),
        ("energy", "energy"),
    ):
        close(metrics[f"loss/{ours}"], n[f"loss_{theirs}"])
    close(total, n["loss_total"])
    close(
        [np.linalg.norm(pick(grads, name)) for name in n["model_grad_keys"]],
        n["model_grad_norms"],
        1e-4,
    )
    close(
        [np.sum(pick(grads, k) * probe(k, pick(grads, k).shape)) for k in n["model_grad_keys"]],
        n["model_grad_dots"],
        1e-4,
    )


def probe(name, shape):
    draws = np.random.RandomState(zlib.crc32(f"public:probe:{name}".encode()))
    return draws.standard_normal(shape)


@pytest.mark.usefixtures("_whole_segments")
def test_the_policy_and_its_gradient(ref):
    n = ref.n
    view = losses.look(ref.params, ref.ema, ref.batch, ref.draws, config=ASIS)
    close(view.trajectory, batch_first(n["trajectory"]))

    def loss(net):
        params = ref.params | {"policy": net}
        return policy.loss(params, ref.ema, view, ref.draws["policy"], config=ASIS)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(ref.params["policy"])
    close(value, n["loss_actor"])
    close(metrics["policy/q_range"], n["actor_scale"][0])
    close(metrics["policy/entropy"], n["actor_entropy_mean"])
    tree = {"policy": grads}
    close(
        [np.linalg.norm(pick(tree, name)) for name in n["actor_grad_keys"]],
        n["actor_grad_norms"],
        1e-4,
    )
    close(
        [np.sum(pick(tree, k) * probe(k, pick(tree, k).shape)) for k in n["actor_grad_keys"]],
        n["actor_grad_dots"],
        1e-4,
    )


def test_the_running_range(ref):
    spread, history = 1.0, []
    low, high = jnp.percentile(jnp.asarray(ref.n["scale_in"][:, 0]), jnp.array([5.0, 95.0]))
    close([low, high], ref.n["scale_percentiles"])
    for _ in range(3):
        spread = spread + 0.01 * (max(float(high - low), 1.0) - spread)
        history.append(spread)
    close(history, ref.n["scale_history"])


@pytest.mark.usefixtures("_whole_segments")
def test_five_updates(ref):
    n = ref.n
    state = _first_state(ref.params, jax.random.key(0), ASIS)
    state = state.replace(ema_params=ref.ema)
    step = jax.jit(functools.partial(apply_update, config=ASIS))
    columns = {
        "total": "loss/total",
        "consistency": "loss/dynamics",
        "reward": "loss/reward",
        "value": "loss/q",
        "energy": "loss/energy",
        "model_grad_norm": "grad/norm",
        "actor": "loss/policy",
        "actor_grad_norm": "grad/policy_norm",
        "actor_scale": "policy/q_range",
    }
    for row in n["update_history"]:
        state, metrics = step(state, ref.batch, ref.draws)
        for name, value in zip(n["update_history_columns"], row, strict=True):
            close(metrics[columns[str(name)]], value, 1e-4)
    first, action = jnp.asarray(n["latent"][:3]), jnp.asarray(n["action"])
    latent = model.encode(state.params, Observation(None, jnp.asarray(n["obs"])), config=ASIS)
    close(latent, n["after5_latent"], 1e-4)
    q_values = functools.partial(model.q_values, config=ASIS)
    close(q_values(state.params, first, action), n["after5_q_values"][..., 0], 1e-4)
    close(q_values(state.ema_params, first, action), n["after5_target_q_values"][..., 0], 1e-4)
    logits = model.energy(state.params, first, action, config=ASIS)
    close(logits, n["after5_energy_logits"][..., 0], 1e-4)
    close(state.params["statistics"]["energy_mean"], n["after5_energy_mean"][0], 1e-4)
    close(state.params["statistics"]["energy_std"], n["after5_energy_std"][0], 1e-4)
    noise, latent = jnp.asarray(n["pi_eps"]), jnp.asarray(n["latent"])
    sample = model.policy(state.params, latent, noise, config=ASIS)
    close(sample.action, n["after5_pi_action"], 1e-4)


def with_statistics(ref):
    statistics = {"energy_mean": ref.n["energy_mean"], "energy_std": ref.n["energy_std"]}
    return ref.params | {"statistics": jax.tree.map(jnp.asarray, statistics)}


def weighted(eta):
    return CONFIG.replace(planner={"eta": eta})


def score(ref, sequences, noise, pair, eta):
    z = jnp.asarray(ref.n["latent"][0, 0])
    tail = TailDraws(jnp.asarray(noise), jnp.asarray(pair))
    empty = jnp.zeros((*sequences.shape[:2], 64))
    return predicted_return(
        with_statistics(ref), z, sequences, empty, config=weighted(eta), steps=1, tail=tail
    )


def test_the_value_of_candidates(ref):
    n = ref.n
    candidates = jnp.asarray(n["candidates"])
    for eta, key in ((0.0, "0"), (0.01, "0p01"), (0.5, "0p5")):
        ours = score(ref, candidates, n["tail_eps"], n["tail_pair"], eta)
        close(ours, n[f"candidate_value_eta_{key}"])
    params = with_statistics(ref)
    z = jnp.broadcast_to(jnp.asarray(n["latent"][0, 0]), (64, 64))
    for t in range(HORIZON):
        action = candidates[:, t]
        close(model.reward(params, z, action, config=CONFIG), n["candidate_reward"][:, t])
        close(model.energy(params, z, action, config=CONFIG), n["candidate_energy"][:, t])
        bonus = model.energy_bonus(params, z, action, config=CONFIG)
        close(bonus, n["candidate_energy_normalized"][:, t])
        z = model.imagine_step(params["dynamics"], z, action, config=CONFIG.model)
    close(z, n["candidate_last_latent"])
    tail = TailDraws(jnp.asarray(n["tail_eps"]), jnp.asarray(n["tail_pair"]))
    close(end_value(params, z, tail, config=CONFIG), n["candidate_tail_value"])


def replay(ref, eps, pi_eps, tail_eps, pairs, previous, eta, elites):
    """A plan with given draws: the mean before each level and after the last, and the values."""
    params, z = with_statistics(ref), jnp.asarray(ref.n["latent"][0, 0])
    spread, shrink = mbdpo.schedule(CONFIG.planner.mbdpo)
    mean, means, values, weights = shift(jnp.asarray(previous), 1), [], [], []

    @jax.jit
    def step(mean, std, eps, pi_eps, tail_eps, pair):
        samples = clip(mean[None] + std * eps)
        proposals = propose_chunks(params, z, pi_eps, config=weighted(eta))
        samples = jnp.concatenate([proposals, samples[proposals.shape[0] :]])
        scores = score(ref, samples, tail_eps, pair, eta)
        return *mbdpo.weighted_mean(samples, scores, elites=elites, temperature=0.5), scores

    for i, std in enumerate(spread):
        means.append(mean)
        mean, weight, _, scores = step(mean, std, eps[i], pi_eps[i], tail_eps[i], pairs[i])
        values.append(scores)
        weights.append(weight)
    return [*means, mean], clip(shrink * mean), np.stack(values), np.stack(weights)


def test_the_schedule(ref):
    spread, shrink = mbdpo.schedule(CONFIG.planner.mbdpo)
    kept = ref.n["alpha_bar"].astype(np.float64)
    close(spread, np.sqrt((1 - kept) / kept)[:0:-1])
    close(shrink, np.sqrt(kept[0]))


@pytest.mark.parametrize(
    ("case", "eta", "warm"), [("warm", 0.01, True), ("first", 0.01, False), ("eta0p5", 0.5, True)]
)
def test_a_plan(ref, case, eta, warm):
    n = ref.n
    previous = n["plan_previous"] if warm else np.zeros_like(n["plan_previous"])
    names = ("plan_eps", "plan_pi_eps", "plan_tail_eps", "plan_pairs")
    means, answer, values, weights = replay(ref, *(n[k] for k in names), previous, eta, elites=16)
    close(values, n[f"plan_{case}_values"], 2e-4)
    kept = n["alpha_bar"][::-1, None, None]
    close(np.sqrt(kept) * np.stack(means), n[f"plan_{case}_x"], 2e-4)
    noise = n["plan_action_noise"] if case == "warm" else 0
    close(np.clip(answer[0] + 0.05 * noise, -1, 1), n[f"plan_{case}_action"], 2e-4)
    close(answer, n[f"plan_{case}_next_previous"], 2e-4)
    if case == "warm":
        close(weights, n["plan_warm_elite_weights"], 2e-4)
        # The authors' step along the score gives the weighted mean: the score cancels.
        stepped = (n["plan_warm_x"][:-1] + (1 - kept[:-1]) * n["plan_warm_score"]) / np.sqrt(
            n["alphas"][::-1][:-1, None, None]
        )
        close(stepped, n["plan_warm_x"][1:])
        close(stepped / np.sqrt(kept[1:]), n["plan_warm_a_bar"], 1e-5)


def test_a_plan_of_the_default_size(ref):
    def rule(name, *shape):
        draws = np.random.RandomState(zlib.crc32(f"public:{name}".encode()))
        return draws.standard_normal(shape).astype(np.float32)

    n = ref.n
    _, answer, values, _ = replay(
        ref,
        rule("full_eps", 19, 512, HORIZON, ACTIONS),
        rule("full_pi_eps", 19, HORIZON, 24, ACTIONS),
        rule("full_tail_eps", 19, 512, ACTIONS),
        n["plan_full_pairs"],
        n["plan_previous"],
        0.01,
        elites=64,
    )
    close(values, n["plan_full_values"], 2e-4)
    close(answer[0], n["plan_full_action"], 2e-4)


def test_the_search_replays_with_its_own_draws(ref):
    """The scan is the loop that the plans above are held against."""
    n = ref.n
    config = PlannerConfig(kind="mbdpo", candidates=64, elites=16)

    def toy(sequences, key):
        return -jnp.sum((sequences - 0.3) ** 2, axis=(1, 2)) + jax.random.normal(
            key, (sequences.shape[0],)
        )

    problem = Problem((HORIZON, ACTIONS), 1, toy)
    carry = jnp.asarray(n["plan_previous"])
    key = jax.random.key(3)
    found, after = mbdpo.search(problem, carry, key, config=config)
    spread, shrink = mbdpo.schedule(config.mbdpo)
    mean = carry
    sample_keys, score_keys, _ = jax.random.split(key, (3, 19))
    for std, sample_key, score_key in zip(spread, sample_keys, score_keys, strict=True):
        noise = jax.random.normal(sample_key, (64, HORIZON, ACTIONS))
        samples = clip(mean[None] + std * noise)
        scores = toy(samples, score_key)
        mean, _, _ = mbdpo.weighted_mean(samples, scores, elites=16, temperature=0.5)
    close(found.sequence, clip(shrink * mean))
    close(after, shift(found.sequence, 1))


def test_the_authors_sizes_have_their_number_of_parameters():
    wide = dict.fromkeys(("latent_dim", "mlp_width", "reward_width", "value_width"), 512)
    config = CONFIG.replace(model=wide | {"policy_width": 512, "encoder_width": 256})
    example = Observation(vector=np.zeros(17, np.float32))
    shapes = jax.eval_shape(
        functools.partial(model.init_params, config=config), jax.random.key(0), example
    )
    assert round(model.parameter_count(shapes) / 1e6, 2) == 5.49  # cheetah's, "size 5"


def test_decoding_inverts_two_hot():
    x = jnp.array([-300.0, -1.5, 0.0, 0.2, 7.0])
    sharp = jnp.log(two_hot(x, 1001) + 1e-30)
    np.testing.assert_allclose(decode(sharp), x, rtol=2e-4, atol=1e-5)
