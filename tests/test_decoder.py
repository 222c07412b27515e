"""The pixel decoder: its network, its files and the script that trains it."""

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from matplotlib.image import imread

from valdi_jax import Agent, cli
from valdi_jax.envs import evaluation_seeds
from valdi_jax.errors import UsageError
from valdi_jax.networks.decoder import Decoder, decode, init_decoder
from valdi_jax.run.agents import packaged
from valdi_jax.run.manifest import file_digest, read_signed, write_signed

ROOT = Path(__file__).parent.parent
D = 5
SMALL = Decoder((8, 12), width=16, depth=1, heads=2, hidden=24)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "experiments")
        return importlib.import_module("decoder")


@pytest.fixture(scope="module")
def params():
    return init_decoder(jax.random.key(0), D, decoder=SMALL)


def latents(*lead):
    return jax.random.normal(jax.random.key(1), (*lead, D))


def test_a_latent_becomes_an_image_whatever_its_leading_axes(params):
    z = latents(2, 3)
    images = decode(params, z, decoder=SMALL)
    assert images.shape == (2, 3, 8, 12, 3)
    chex.assert_trees_all_close(decode(params, z[1, 2], decoder=SMALL), images[1, 2], atol=1e-6)
    steep = params | {"pixels": jax.tree.map(lambda kernel: 1e4 * kernel, params["pixels"])}
    extreme = decode(steep, z, decoder=SMALL)
    assert 0 <= extreme.min() < 0.1
    assert 0.9 < extreme.max() <= 1


def test_each_token_draws_its_own_patch(params):
    """Without blocks, a token's position moves the pixels of its patch alone."""
    flat = Decoder((8, 12), width=16, depth=0)
    kept = {name: params[name] for name in ("positions", "latent", "norm", "pixels")}
    moved = kept | {"positions": params["positions"].at[4].add(jnp.arange(16.0))}  # row 1, column 1
    z = latents()
    changed = decode(moved, z, decoder=flat) != decode(kept, z, decoder=flat)
    expected = np.zeros((8, 12), bool)
    expected[4:8, 4:8] = True
    np.testing.assert_array_equal(changed.any(axis=-1), expected)


def test_the_full_decoder_has_the_paper_s_size():
    width, hidden, tokens = 256, 512, (96 // 4) ** 2
    attention = width + width * 3 * width + width * width  # the norm's scale, qkv, projection
    block = attention + width + 2 * width * hidden
    count = 64 * width + tokens * width + 3 * block + width + width * 4 * 4 * 3
    assert count == 1_750_784
    shapes = jax.eval_shape(lambda key: init_decoder(key, 64, decoder=Decoder()), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    assert 2 * count < 5e6  # bytes in half precision


def test_patches_must_tile_the_image():
    with pytest.raises(ValueError, match="do not tile"):
        init_decoder(jax.random.key(0), D, decoder=Decoder((8, 10)))


@pytest.fixture(scope="module")
def frames(script):
    """Frames whose brightness is what the first number of the latent says."""
    z = np.array(latents(40))
    bright = 255 / (1 + np.exp(-3 * z[:, 0]))
    images = np.broadcast_to(bright[:, None, None, None], (40, 8, 12, 3)).astype(np.uint8)
    return script.Frames(z[:32], images[:32]), script.Frames(z[32:], images[32:])


def fit(script, params, frames, **settings):
    settings = {"epochs": 15, "batch_size": 8, "learning_rate": 1e-2, "seed": 0} | settings
    return script.fit(params, *frames, decoder=SMALL, **settings)


def test_training_learns_what_the_latent_says(script, params, frames):
    records = []
    learned, last = fit(script, params, frames, on_epoch=records.append)
    assert [record["epoch"] for record in records] == list(range(1, 16))
    assert last == records[-1]
    assert last["updates"] == 15 * 4
    assert last["loss/train"] < records[0]["loss/train"] / 4
    # A decoder blind to the latent cannot do as well on frames that it has not seen.
    assert last["loss/validation"] < script.constant_error(*frames) / 4
    direct = decode(learned, jnp.asarray(frames[1].latents), decoder=SMALL)
    expected = float(np.square(direct - frames[1].images / np.float32(255)).mean())
    assert last["loss/validation"] == pytest.approx(expected, rel=1e-4)


def test_the_mean_error_counts_every_frame_once(script, params, frames):
    few = script.Frames(frames[0].latents[:11], frames[0].images[:11])
    whole, parts = (
        script.mean_error(params, few, decoder=SMALL, batch_size=size) for size in (11, 8)
    )
    assert parts == pytest.approx(whole, rel=1e-5)


def test_an_interruption_keeps_what_was_learned(script, params, frames):
    calls = []

    def on_update():
        calls.append(None)
        if len(calls) > 6:
            raise cli.Interrupted(signal.SIGINT)

    learned, last = fit(script, params, frames, on_update=on_update)
    assert (last["epoch"], last["updates"]) == (2, 6)
    assert not np.array_equal(learned["positions"], params["positions"])
    kept, nothing = fit(script, params, frames, on_update=on_update)
    assert nothing == {}
    chex.assert_trees_all_equal(kept, params)


@pytest.fixture
def stored(script, params, tmp_path):
    script.save(tmp_path, params, {"agent": "mine"}, decoder=SMALL, half=False)
    return tmp_path


def test_a_stored_decoder_is_the_same_decoder(script, params, stored):
    decoder, loaded, record = script.load(stored)
    assert decoder == SMALL
    assert record["agent"] == "mine"
    chex.assert_trees_all_equal(loaded, params)
    script.save(stored, params, {}, decoder=SMALL, half=True)
    assert (stored / "decoder.safetensors").stat().st_size < 2.5 * record["parameters"] + 1000
    _, halved, _ = script.load(stored)
    assert {x.dtype.name for x in jax.tree.leaves(halved)} == {"float32"}
    chex.assert_trees_all_close(halved, params, atol=1e-3)


def resize(record):
    record["decoder"]["width"] = 32


def forget(record):
    del record["decoder"]["patch"], record["latent_dim"]


@pytest.mark.parametrize("change", [resize, forget])
def test_a_record_that_does_not_fit_is_refused(script, stored, change):
    record = read_signed(stored / "decoder.json")
    change(record)
    write_signed(stored / "decoder.json", record)
    with pytest.raises(UsageError, match="not a whole decoder"):
        script.load(stored)


@pytest.mark.parametrize("name", ["decoder.json", "decoder.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_refused(script, stored, name, damage):
    path = stored / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[:-9] if damage == "cut" else data)
    if damage == "remove":
        path.unlink()
    with pytest.raises(UsageError, match="not a whole decoder"):
        script.load(stored)


def test_numbers_that_are_not_finite_are_refused(script, params, stored):
    broken = params | {"positions": params["positions"].at[0, 0].set(1e6)}
    with pytest.raises(UsageError, match="positions is not finite in float16"):
        script.save(stored, broken, {}, decoder=SMALL, half=True)
    tensors = {name: np.array(x) for name, x in traverse_util.flatten_dict(params, sep=".").items()}
    tensors["positions"][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, stored / "decoder.safetensors")
    record = read_signed(stored / "decoder.json")
    record["tensors_sha256"] = file_digest(stored / "decoder.safetensors")
    write_signed(stored / "decoder.json", record)
    with pytest.raises(UsageError, match="positions does not hold finite numbers"):
        script.load(stored)


def test_a_shipped_decoder_is_of_the_agent_that_it_is_named_after(script, monkeypatch, tmp_path):
    names = [path.name for path in script.SHIPPED.iterdir()]
    assert "carracing" in names
    for name in names:
        directory = script.shipped(name)
        decoder, _ = script.load_for(Agent.load(name), name, directory)  # refuses another agent's
        assert decoder.image == (48, 48)
        *_, record = script.load(directory)
        assert record["errors"]["validation"] < record["data"]["constant_error"] / 3
        assert (directory / "samples.png").exists()
    assert script.shipped("pendulum") is None
    assert script.shipped("../decoders/carracing") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "carracing").mkdir()
    assert script.shipped("carracing") is None, "the folder is meant"


def test_many_latents_are_decoded_as_one_is(script, params):
    z = latents(script.DECODED + 3)
    images = script.decode_all(params, z, decoder=SMALL)
    chex.assert_trees_all_close(images, decode(params, z, decoder=SMALL), atol=1e-5)


def test_no_episode_is_one_of_the_evaluation(script, monkeypatch):
    jobs = script.make_jobs(200, 0)
    seeds = [job.seed for job in jobs]
    assert len(set(seeds)) == 200
    assert not set(seeds) & set(evaluation_seeds(100))
    assert [job.seed for job in script.make_jobs(3, 0)] == seeds[:3]
    assert script.make_jobs(1, 1)[0].seed != seeds[0]
    # Were one of the draws a fixed seed, it would be left out.
    monkeypatch.setattr(script, "evaluation_seeds", lambda count: [seeds[1]])
    assert [job.seed for job in script.make_jobs(2, 0)] == [seeds[0], seeds[2]]


def test_the_script_trains_a_decoder_of_a_bundled_agent(script, tmp_path):
    assert "carracing" in packaged()
    command = [sys.executable, "experiments/decoder.py", "carracing", "--quick", "--half"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    decoder, params, record = script.load(tmp_path)
    assert (decoder.image, decoder.depth) == ((48, 48), 1)
    assert record["data"]["frames"] == 2 * 21  # one a decision, and the last
    assert record["data"]["validation_frames"] == 21
    assert decode(params, jnp.zeros(64), decoder=decoder).shape == (48, 48, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["loss/train"] < lines[0]["loss/train"]
    assert record["errors"]["validation"] == lines[1]["loss/validation"]
    assert f"{record['parameters']:,} parameters" in done.stdout
    image = imread(tmp_path / "samples.png")
    assert image.shape[:2] == (2 * (192 + 4), 8 * (192 + 4))
    with pytest.raises(UsageError, match=r"holds decoder\.json already"):
        script.make_directory(tmp_path)


def test_an_agent_without_images_is_refused(script, tmp_path):
    with pytest.raises(UsageError, match="the agent of pendulum sees no images"):
        script.main(["pendulum", "--quick", "--out", str(tmp_path)])


def test_options_that_make_no_sense_are_refused(script, tmp_path):
    for option in ("--episodes", "--validation", "--batch-size", "--learning-rate"):
        with pytest.raises(UsageError, match=f"{option} is 0"):
            script.parse_arguments(["carracing", "--out", str(tmp_path), option, "0"])
