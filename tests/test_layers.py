import jax
import jax.numpy as jnp
import numpy as np
import pytest

from valdi_jax.networks import layers
from valdi_jax.networks.layers import convolve


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "pad", "form"),
    [
        ((20, 24, 24, 3), 5, 3, 2, "_convolve_blocks"),
        ((2, 17, 50, 4), 5, 3, 2, "_convolve_blocks"),
        ((2, 12, 13, 1), 3, 2, 1, "_convolve_blocks"),
        ((4, 4, 4, 8), 4, 1, 0, "_convolve_whole"),
        ((4, 8, 8, 8), 3, 2, 1, None),
        ((2, 20, 20, 4), 8, 4, 0, None),
        ((2, 10, 10, 3), 3, 3, 0, None),
        ((2, 10, 10, 3), 4, 3, 1, None),
        ((2, 10, 10, 3), 4, 2, 1, None),
        ((2, 4, 4, 3), 4, 1, 1, None),
    ],
)
def test_a_convolution_and_its_gradient_match_jax(shape, kernel, stride, pad, form, monkeypatch):
    used = []
    for name in ("_convolve_blocks", "_convolve_whole"):
        original = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *a, f=original, n=name: (used.append(n), f(*a))[1])
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape)
    weights = jax.random.normal(keys[1], (kernel, kernel, shape[-1], 7))

    def run(function, x, weights):
        settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return function(x, weights, (stride, stride), [(pad, pad)] * 2, **settings)

    ours = run(convolve, x, weights)
    theirs = run(jax.lax.conv_general_dilated, x, weights)
    assert set(used) == ({form} if form else set())
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(jnp.abs(theirs).max()))
    cotangent = jax.random.normal(keys[2], theirs.shape)
    for argument in (0, 1):
        one, other = (
            jax.grad(lambda *a, f=f: jnp.sum(run(f, *a) * cotangent), argument)(x, weights)
            for f in (convolve, jax.lax.conv_general_dilated)
        )
        np.testing.assert_allclose(one, other, atol=1e-6 * float(jnp.abs(other).max()))


@pytest.mark.parametrize(
    ("kernel", "strides", "padding"),
    [
        ((5, 5), (3, 1), [(2, 2), (2, 2)]),
        ((5, 5), (3, 3), [(2, 2), (0, 0)]),
        ((5, 3), (3, 3), [(2, 2), (2, 2)]),
        ((12, 12), (1, 1), [(0, 0), (2, 2)]),
    ],
)
def test_a_convolution_that_is_not_square_matches_jax(kernel, strides, padding):
    x = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    weights = jax.random.normal(jax.random.key(1), (*kernel, 3, 7))
    ours, theirs = (
        f(x, weights, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        for f in (convolve, jax.lax.conv_general_dilated)
    )
    np.testing.assert_array_equal(ours, theirs)
