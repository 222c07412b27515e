import numpy as np
import pytest
from conftest import reference_tensors

from valdi_jax.convert import params_from_reference
from valdi_jax.presets import PRESETS

PAPER = PRESETS["paper"]


@pytest.fixture
def tensors():
    return reference_tensors("diffusion")


def test_a_missing_tensor_is_named(tensors):
    del tensors["reward.layers.3.bias"]
    with pytest.raises(ValueError, match=r"'reward\.layers\.3\.bias'"):
        params_from_reference(tensors, PAPER)


def test_an_unknown_tensor_is_named(tensors):
    tensors["policy.weight"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"'policy\.weight'"):
        params_from_reference(tensors, PAPER)


def test_a_tensor_of_another_shape_is_named(tensors):
    tensors["vs.models.0.0.weight"] = np.zeros((512, 65))
    with pytest.raises(ValueError, match=r"'vs.models.0.0.weight' has shape \(512, 65\)"):
        params_from_reference(tensors, PAPER)


def test_values_that_are_not_finite_are_refused(tensors):
    tensors["encoder.head.0.weight"][3] = np.nan
    with pytest.raises(ValueError, match=r"'encoder.head.0.weight' holds values"):
        params_from_reference(tensors, PAPER)


def test_weights_of_the_other_world_model_are_refused():
    with pytest.raises(ValueError, match="missing"):
        params_from_reference(reference_tensors("mlp"), PAPER)
