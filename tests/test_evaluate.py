import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from valdi_jax import cli, evaluate
from valdi_jax.errors import UsageError
from valdi_jax.model import init_params
from valdi_jax.observation import Observation
from valdi_jax.presets import PRESETS
from valdi_jax.run import checkpoint, video


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    config = PRESETS["tiny"]
    example = Observation(image=np.zeros((96, 96, 3), np.uint8), vector=np.zeros(7, np.float32))
    checkpoint.create_run(directory, config)
    checkpoint.save_params(directory, init_params(jax.random.key(0), example, config=config))
    return directory


def test_the_summary_by_hand():
    numbers = evaluate.summary([8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert numbers["mean"] == numbers["median"] == numbers["interquartile_mean"] == 4.5
    assert numbers["standard_error"] == pytest.approx(6**0.5 / 8**0.5)
    outlier = evaluate.summary([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1000.0])
    assert outlier["interquartile_mean"] == 1
    assert evaluate.summary([3.0, 3.0])["standard_error"] == 0
    assert evaluate.summary([3.0])["standard_error"] is None


def test_every_episode_is_written_for_every_number_of_steps(run, tmp_path, capsys):
    path = tmp_path / "out.json"
    evaluate.main([str(run), "--episodes", "1", "--json", str(path)])
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["results"]
    arguments = [str(run), "--episodes", "2", "--diffusion-steps", "1", "2", "--json", str(path)]
    assert evaluate.main(arguments) == 0
    results = json.loads(path.read_text())["results"]
    assert [r["diffusion_steps"] for r in results] == [1, 2]
    for result in results:
        returns = [e["return"] for e in result["episodes"]]
        assert result["mean"] == pytest.approx(np.mean(returns))
        assert [e["length"] for e in result["episodes"]] == [60, 60]
        assert len({e["seed"] for e in result["episodes"]}) == 2
    assert f"{results[0]['mean']:.1f}" in capsys.readouterr().out


def test_a_signal_keeps_what_is_scored(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr(
        evaluate.ProgressBar, "update", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    assert evaluate.main([str(run), "--episodes", "3", "--json", str(path)]) == 130
    (result,) = json.loads(path.read_text())["results"]
    (episode,) = result["episodes"]
    printed = capsys.readouterr()
    assert f"{episode['return']:.1f}" in printed.out
    assert "stopped after 1 of 3 episodes" in printed.err


def test_a_signal_keeps_the_first_episodes_however_short_the_others_are(run, tmp_path, monkeypatch):
    path, jobs = tmp_path / "out.json", evaluate.evaluation_seeds(4)

    def some(params, config, *, on_rollout, **settings):
        (whole,) = own(params, config, episodes=1)
        for seed in (jobs[1], jobs[3], jobs[0]):  # as they end: the third is still driven
            episode = dataclasses.replace(whole.episode, seed=seed)
            on_rollout(dataclasses.replace(whole, episode=episode))
        raise cli.Interrupted(signal.SIGTERM)

    own = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", some)
    assert evaluate.main([str(run), "--episodes", "4", "--json", str(path)]) == 130
    (result,) = json.loads(path.read_text())["results"]
    assert [episode["seed"] for episode in result["episodes"]] == jobs[:2]


def test_an_earlier_checkpoint_can_be_evaluated(run, capsys):
    path = run / "checkpoints" / "00000000"
    assert evaluate.main([str(path), "--episodes", "1"]) == 0
    assert f"{path}, 1 episodes" in capsys.readouterr().out


def test_the_same_parameters_act_the_same_way(run, tmp_path):
    returns = []
    for name in ("one.json", "two.json"):
        evaluate.main([str(run), "--episodes", "1", "--json", str(tmp_path / name)])
        data = json.loads((tmp_path / name).read_text())
        returns.append(data["results"][0]["episodes"][0]["return"])
    assert returns[0] == returns[1]


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_rollout_can_be_recorded(run, tmp_path, suffix):
    import imageio.v3 as imageio

    path = tmp_path / f"drive{suffix}"
    evaluate.main([str(run), "--episodes", "1", "--video", str(path)])
    frames = imageio.imread(path)
    assert frames.shape[0] >= 15
    assert frames.shape[-1] in (3, 4)
    assert np.any(frames[0] != frames[-1])


def test_a_signal_while_filming_ends_the_evaluation(run, tmp_path, monkeypatch, capsys):
    def interrupted(*args, on_decision, **kwargs):
        signal.raise_signal(signal.SIGINT)
        on_decision()

    monkeypatch.setattr(evaluate, "record_video", interrupted)
    assert evaluate.main([str(run), "--episodes", "1", "--video", str(tmp_path / "x.gif")]) == 130
    assert "episodes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (RuntimeError("gladLoadGL error"), "MUJOCO_GL=egl"),
        (TypeError("unexpected keyword argument"), "takes render_mode=None"),
    ],
)
def test_an_environment_that_cannot_be_drawn_is_scored_all_the_same(
    run, tmp_path, monkeypatch, capsys, error, hint
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(video, "own_env", fail)
    path = tmp_path / "drive.gif"
    assert evaluate.main([str(run), "--episodes", "1", "--video", str(path)]) == 0
    output = capsys.readouterr()
    assert "1 episodes" in output.out
    assert str(error) in output.err
    assert hint in output.err
    assert not path.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere is not a run directory"),
        (["{run}", "--episodes", "101"], "between 1 and 100"),
        (["{run}", "--episdoes", "1"], "unknown option --episdoes: did you mean --episodes"),
        (["{run}", "--video", "x.avi"], "writes .gif or .mp4"),
        (["{run}", "--video", "no/dir/x.gif"], "cannot write no/dir/x.gif"),
        (["{run}", "--json", "no/dir/x.json"], "cannot write no/dir/x.json"),
        (["{run}", "--json", "/"], "cannot write /: Is a directory"),
        (["{run}", "--diffusion-steps", "1001"], "must be at most"),
        (["{run}", "--num-envs", "0"], "must be above 0"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(run, argv, message):
    with pytest.raises(UsageError, match=message):
        evaluate.main([token.format(run=run) for token in argv])
