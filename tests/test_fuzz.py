"""Reading any file gives what was written or one clear error."""

import json

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_replay import episode
from toy import CONFIG

from valdi_jax.config import Config, from_dict, to_dict
from valdi_jax.errors import UsageError
from valdi_jax.observation import Observation
from valdi_jax.run import checkpoint, manifest, npz

EXAMPLE = Observation(vector=np.zeros(2, np.float32))
FUZZ = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def places(data, path=()):
    """Every path into nested dicts."""
    for name, value in data.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


@FUZZ
@given(path=st.sampled_from(list(places(to_dict(CONFIG)))), value=JSON)
@example(path=("env",), value={"\n": None})
def test_a_configuration_is_read_or_refused(path, value):
    data = to_dict(CONFIG)
    inner = data
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    try:
        config = from_dict(data)
    except UsageError as error:
        assert path[0] in str(error)
        assert "\n" not in str(error)
    else:
        assert isinstance(config, Config)
        assert json.dumps(to_dict(config), default=list) == json.dumps(data, default=list) or (
            isinstance(value, (int, dict))  # a float field takes the one, a section fills the other
        )


def damage(content, position, byte, cut):
    content = bytearray(content)
    content[position % len(content)] = byte
    return bytes(content[: len(content) - cut])


DAMAGE = {
    "position": st.integers(0, 10**6),
    "byte": st.integers(0, 255),
    "cut": st.sampled_from([0, 0, 1, 7, 100]),
}


@FUZZ
@given(**DAMAGE)
def test_a_damaged_episode_is_never_another_one(tmp_path, position, byte, cut):
    original = episode(3, 20, terminated=True)
    digest = npz.save_episode(tmp_path, 3, original)
    path = tmp_path / "replay" / "00000003.npz"
    intact = path.read_bytes()
    path.write_bytes(damage(intact, position, byte, cut))
    assert (manifest.file_digest(path) == digest) == (path.read_bytes() == intact)
    try:
        read = npz.load_episode(tmp_path, 3, EXAMPLE, CONFIG)
    except UsageError as error:
        assert "00000003.npz" in str(error)
    else:
        np.testing.assert_array_equal(read.rewards, original.rewards)
        np.testing.assert_array_equal(read.actions, original.actions)


@FUZZ
@given(content=st.binary(max_size=300))
def test_bytes_that_are_not_an_episode_are_refused(tmp_path, content):
    (tmp_path / "replay").mkdir(exist_ok=True)
    (tmp_path / "replay" / "00000003.npz").write_bytes(content)
    try:
        npz.load_episode(tmp_path, 3, EXAMPLE, CONFIG)
    except UsageError as error:
        assert "00000003.npz" in str(error)
    else:
        raise AssertionError("something was read")


@FUZZ
@given(**DAMAGE)
def test_a_damaged_manifest_is_refused(tmp_path, position, byte, cut):
    manifest.write_signed(
        tmp_path / manifest.MANIFEST, {"files": {}, "replay": {"3": "ab"}, "updates": 7}
    )
    path = tmp_path / manifest.MANIFEST
    intact = path.read_bytes()
    path.write_bytes(damage(intact, position, byte, cut))
    if path.read_bytes() != intact:
        assert checkpoint.verify(tmp_path)
