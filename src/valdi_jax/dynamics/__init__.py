"""World models, one file each, and their registry."""

from valdi_jax.dynamics import diffusion, flow, mlp, simplex
from valdi_jax.dynamics.base import Dynamics
from valdi_jax.registry import Registry

DYNAMICS: Registry[Dynamics] = Registry(
    "--model.dynamics",
    {
        "diffusion": diffusion.DYNAMICS,
        "flow": flow.DYNAMICS,
        "mlp": mlp.DYNAMICS,
        "simplex": simplex.DYNAMICS,
    },
)
