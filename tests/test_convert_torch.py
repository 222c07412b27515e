import numpy as np
import pytest
from conftest import reference_tensors

from valdi_jax import convert
from valdi_jax.errors import UsageError
from valdi_jax.run import checkpoint, rundir

torch = pytest.importorskip("torch", reason="needs the extra 'torch'")


@pytest.mark.parametrize("dynamics", ["diffusion", "mlp"])
def test_a_checkpoint_file_becomes_a_run_that_can_be_evaluated(tmp_path, dynamics):
    model = {name: torch.tensor(x) for name, x in reference_tensors(dynamics).items()}
    if dynamics == "diffusion":
        model["alphas_cumprod"] = torch.ones(1000)
    settings = {"dynamics_type": dynamics, "device": "cuda:0", "pop_size": 32, "n_elite": 4}
    torch.save({"cfg": settings, "model": model, "epoch": 3}, tmp_path / "agent.pth")
    assert convert.main([str(tmp_path / "agent.pth"), str(tmp_path / "run")]) == 0

    config = rundir.load_config(tmp_path / "run")
    assert config.model.dynamics == dynamics
    assert config.planner.candidates == 32
    params = checkpoint.load_params(
        rundir.latest(tmp_path / "run"), convert.reference_observation(), config
    )
    kernel = params["reward"]["net"]["inputs"]["dense"]["kernel"]
    np.testing.assert_array_equal(kernel, model["reward.layers.0.weight"].numpy().T)


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": Malicious()}, "not a checkpoint of tensors and plain data"),
        ({"weights": {}}, "has no 'model'"),
        ({"model": {}, "cfg": {"dynamics_type": "gan"}}, "unknown 'gan'"),
        ({"model": {}, "cfg": {"pop_size": "many"}}, "'pop_size' of the checkpoint is 'many'"),
        ({"model": {}, "cfg": {"pop_size": float("nan")}}, "'pop_size' of the checkpoint is nan"),
        ({"model": {}, "cfg": {"lr": 10**400}}, "'lr' of the checkpoint is 1000"),
        ({"model": {}, "cfg": {"horizon": 5.7}}, "'horizon' of the checkpoint is 5.7"),
        ({"model": {}, "cfg": {"dynamics_type": ["mlp"]}}, "unknown"),
        ({"model": {}, "cfg": [1]}, "is not a table"),
        ({"model": {}, "cfg": {}}, "tensors are missing"),
        ({"model": {1: torch.ones(1), "a": torch.ones(1)}}, "1 is no dense tensor"),
        ({"model": {"w": torch.ones(1, dtype=torch.complex64)}}, "'w' is no dense tensor"),
        ({"model": {"w": torch.eye(2).to_sparse()}}, "'w' is no dense tensor"),
        ({"model": {"w": torch.ones(1, device="meta")}}, "'w' is no dense tensor"),
        ({"model": {"w": torch.ones(1).expand(10**13)}}, "'w' is no dense tensor"),
        ({"model": {"w": torch.ones(1, dtype=torch.int8)}}, "'w' is no dense tensor"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UsageError, match=message):
        convert.main([str(tmp_path / "file.pth"), str(tmp_path / "run")])
    assert "executed" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_half_precision_is_read(tmp_path):
    model = {name: torch.tensor(x) for name, x in reference_tensors("mlp").items()}
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in model.items()}
    torch.save({"cfg": {"dynamics_type": "mlp"}, "model": halved}, tmp_path / "agent.pth")
    tensors, _ = convert.read_checkpoint(tmp_path / "agent.pth")
    for name, tensor in model.items():
        np.testing.assert_allclose(tensors[name], tensor, rtol=2**-8)


def test_a_file_not_written_by_torch_is_refused(tmp_path):
    (tmp_path / "file.pth").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="not a checkpoint of tensors and plain data"):
        convert.main([str(tmp_path / "file.pth"), str(tmp_path / "run")])
