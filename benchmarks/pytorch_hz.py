"""The plan and the update at the paper's sizes, in plain PyTorch and in this package.

python benchmarks/pytorch_hz.py --seconds 60

The networks, candidates and passes are the same, in idiomatic eager PyTorch: library layers, fused
attention, `torch.inference_mode`. The calls alternate, so that drift of the machine slows both, and
the ratio is the median over the pairs. The data is noise: nothing is learnt. Needs the extra
``torch``.
"""

from __future__ import annotations

import argparse
import copy

import jax
import measure
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from update_hz import random_batch

import valdi_jax
from valdi_jax import PRESETS, init_state
from valdi_jax.config import Config
from valdi_jax.model import parameter_count

GELU = functional.gelu


class Residual(nn.Module):
    """What `layers.ResidualMLP` computes."""

    def __init__(self, inputs: int, width: int, depth: int, outputs: int):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.GELU("tanh"),
                nn.Linear(2 * width, width),
            )
            for _ in range(depth)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.inner = nn.Linear(width, hidden, bias=False)
        self.outer = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.outer(GELU(self.inner(self.norm_2(x)), approximate="tanh"))


class Agent(nn.Module):
    """All networks, including the diffusion world model."""

    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        self.config = model
        inputs, convolutions = 3, []
        shapes = ((5, 3, 2), (3, 2, 1), (3, 2, 1), (3, 2, 1), (4, 1, 0))
        for outputs, (kernel, stride, padding) in zip(model.cnn_channels, shapes, strict=True):
            convolutions += [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.GELU("tanh")]
            inputs = outputs
        width = model.encoder_width
        self.image = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(inputs, width))
        self.vector = nn.Sequential(nn.Linear(7, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.head = nn.Sequential(
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, 2 * width),
            nn.GELU("tanh"),
            nn.Linear(2 * width, model.latent_dim),
        )
        token, chunk = model.transformer_width, model.chunk * model.action_dim
        self.condition = nn.Parameter(torch.randn(token - model.latent_dim) * 0.02)
        rest = token - model.timestep_dim - chunk - model.latent_dim
        self.markers = nn.Parameter(torch.randn(model.horizon, rest) * 0.02)
        self.timestep = nn.Embedding(model.diffusion_timesteps, model.timestep_dim)
        self.blocks = nn.ModuleList(
            Block(token, model.transformer_heads, model.transformer_hidden)
            for _ in range(model.transformer_depth)
        )
        self.norm = nn.LayerNorm(token, bias=False)
        self.velocity = nn.Linear(token, model.latent_dim, bias=False)
        self.reward = Residual(model.latent_dim + chunk, model.reward_width, model.reward_depth, 1)
        hidden = model.value_width
        self.values = nn.ModuleList(
            nn.Sequential(
                nn.Linear(model.latent_dim, hidden),
                nn.GELU("tanh"),
                nn.Linear(hidden, hidden),
                nn.GELU("tanh"),
                nn.Linear(hidden, 1),
            )
            for _ in range(model.value_heads)
        )

    def encode(self, frames, vectors):
        image = self.image(frames.permute(0, 3, 1, 2).float() / 255)
        return self.head(torch.cat([image, self.vector(vectors)], -1))

    def denoise(self, z, actions, noised, timestep):
        batch, horizon = noised.shape[:2]
        embedding = self.timestep(timestep)[:, None].expand(-1, horizon, -1)
        markers = self.markers.expand(batch, -1, -1)
        tokens = torch.cat([embedding, markers, actions, noised], -1)
        condition = torch.cat([z, self.condition.expand(batch, -1)], -1)
        x = torch.cat([condition[:, None], tokens], 1)
        for block in self.blocks:
            x = block(x)
        return self.velocity(self.norm(x[:, 1:]))

    def value(self, z):
        return torch.stack([head(z)[..., 0] for head in self.values])


@torch.inference_mode()
def plan(agent: Agent, config: Config, frame, vector):
    """The cross-entropy method."""
    model, planner = config.model, config.planner
    z = agent.encode(frame[None], vector[None]).expand(planner.candidates, -1)
    mean, std = torch.zeros(config.plan_shape), torch.ones(config.plan_shape)
    best, best_score = mean, -torch.inf
    last = torch.full((planner.candidates,), model.diffusion_timesteps - 1)
    discounts = config.learn.discount ** (model.chunk * torch.arange(model.horizon + 1))
    for _ in range(planner.iterations):
        samples = mean + std * torch.randn(planner.candidates, *mean.shape)
        actions = torch.tanh(samples).view(planner.candidates, model.horizon, -1)
        noise = torch.randn(planner.candidates, model.horizon, model.latent_dim)
        # At the last timestep the sample is pure noise, and the clean estimate is minus the
        # velocity.
        imagined = -agent.denoise(z, actions, noise, last)
        states = torch.cat([z[:, None], imagined[:, :-1]], 1)
        rewards = agent.reward(torch.cat([states, actions], -1))[..., 0]
        scores = rewards @ discounts[:-1]
        scores += discounts[-1] * agent.value(imagined[:, -1]).min(0).values
        top, indices = scores.topk(planner.elites)
        elite = samples[indices]
        mean, std = elite.mean(0), elite.std(0)
        if top[0] > best_score:
            best, best_score = elite[0], top[0]
    return torch.tanh(best)


def sigreg(z, directions, knots: int):
    points = torch.linspace(0, 3, knots)
    angles = (z @ directions)[..., None] * points
    gaussian = torch.exp(-(points**2) / 2)
    error = (angles.cos().mean(0) - gaussian) ** 2 + angles.sin().mean(0) ** 2
    return (z.shape[0] * error @ gaussian).mean()


def update(agent: Agent, target: Agent, optimizer, config: Config, batch):
    """One optimizer step on a batch of noise, and the moving average of the parameters."""
    model, learn = config.model, config.learn
    frames, vectors, actions, rewards = batch
    size, horizon = learn.batch_size, model.horizon
    z = agent.encode(frames[:, 0], vectors[:, 0])
    with torch.no_grad():
        after = frames[:, 1:].flatten(0, 1), vectors[:, 1:].flatten(0, 1)
        following = agent.encode(*after).view(size, horizon + 1, -1)
        before = frames[:, 1:-1].flatten(0, 1), vectors[:, 1:-1].flatten(0, 1)
        targets = target.encode(*before).view(size, horizon, -1)
        values = rewards + learn.discount**model.chunk * target.value(following).min(0).values
        noise = torch.randn_like(targets)
        timesteps = torch.randint(model.diffusion_timesteps, (size,))
        alpha = torch.rand(size, 1, 1)
        noised = alpha.sqrt() * targets + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * targets
    predicted = agent.denoise(z, actions[:, :-1], noised, timesteps)
    clean = alpha.sqrt() * noised - (1 - alpha).sqrt() * predicted
    trajectory = torch.cat([z[:, None], clean], 1)
    reward = agent.reward(torch.cat([trajectory, actions], -1))[..., 0]
    directions = functional.normalize(torch.randn(model.latent_dim, learn.sigreg_directions), dim=0)
    loss = functional.mse_loss(predicted, velocity)
    loss = loss + learn.reward_weight * functional.mse_loss(reward, rewards)
    value = agent.value(trajectory)
    loss = loss + learn.value_weight * functional.mse_loss(value, values.expand_as(value))
    loss = loss + learn.sigreg_weight * sigreg(z, directions, learn.sigreg_knots)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), learn.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        for average, online in zip(target.parameters(), agent.parameters(), strict=True):
            average.lerp_(online, learn.ema_rate)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=["paper", "tiny"], default="paper")
    parser.add_argument("--seconds", type=float, default=60.0, help="measured for each row")
    arguments = parser.parse_args()

    config = PRESETS[arguments.preset]
    rng = np.random.default_rng(0)
    seen = measure.example_observation(rng, config)
    holder = [init_state(jax.random.key(0), seen, config=config)]
    agent = Agent(config)
    theirs = sum(parameter.numel() for parameter in agent.parameters())
    assert theirs == parameter_count(holder[0].params), "these are not the networks of ours"
    target = copy.deepcopy(agent).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), config.learn.learning_rate)
    noise = random_batch(rng, config)
    batch = (
        torch.from_numpy(noise.observations.image),
        torch.from_numpy(noise.observations.vector),
        torch.from_numpy(noise.actions),
        torch.from_numpy(noise.rewards.sum(-1)),
    )

    def our_plan():
        return valdi_jax.plan(holder[0].params, seen, jax.random.key(1), config=config).actions

    def our_update():
        holder[0], metrics = valdi_jax.update(holder[0], noise, config=config)
        return metrics

    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'name':<10}{'pytorch_ms':>12}{'ours_ms':>12}{'ratio':>8}{'quartiles':>16}")
    for name, their_call, our_call in (
        ("plan", lambda: plan(agent, config, batch[0][0, 0], batch[1][0, 0]), our_plan),
        ("update", lambda: update(agent, target, optimizer, config, batch), our_update),
    ):
        times = measure.alternate(their_call, our_call, arguments.seconds)
        their_ms, our_ms = 1e3 * np.median(times, axis=0)
        low, ratio, high = np.percentile(times[:, 1] / times[:, 0], (25, 50, 75))
        print(f"{name:<10}{their_ms:>12.1f}{our_ms:>12.1f}{ratio:>8.2f}{low:>9.2f} ..{high:.2f}")


if __name__ == "__main__":
    main()
