"""For arbitrarily malformed folders, every check returns a row quickly and without an unexpected exception."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt_hf.doctor import card, code, config, files, weights
from minigpt_hf.doctor.folder import Folder
from minigpt_hf.doctor.row import plain, some
from tests.doctor.conftest import Broken

IN_THIS_PROCESS = [check for module in (files, config, code, weights, card) for check in module.CHECKS]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = ("config.json", "generation_config.json", "tokenizer_config.json", "minigpt.json")


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory):
    return Broken(run_folder / "model", tmp_path_factory.mktemp("malformed"))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_check_returns_a_row_for_a_setting_of_any_type(data, folder):
    name = data.draw(st.sampled_from(NAMES))
    before = (folder.path / name).read_text()
    content = json.loads(before)
    key = data.draw(st.sampled_from(sorted(content)))
    try:
        folder.write(name, json.dumps({**content, key: data.draw(VALUES)}))
        rows = [check(Folder(folder.path)) for check in IN_THIS_PROCESS]
    finally:
        folder.write(name, before)
    assert [row.name for row in rows] == [check.row_name for check in IN_THIS_PROCESS]
    assert [row for row in rows if "raised an error" in row.reason] == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=80), st.integers(0, 100))
def test_the_weights_header_check_returns_a_row_for_any_bytes(noise, at):
    valid = (
        b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}      ' + b"\0" * 16
    )
    content = valid[:at] + noise + valid[at + len(noise) :]

    class InMemory(Folder):
        def __init__(self):
            self.files, self.others, self._parsed = {"model.safetensors": len(content)}, {}, {}

        def open(self, name):
            import io

            return io.BytesIO(content)

    row = weights.header(InMemory())
    assert row.state in ("pass", "fail")
    assert "raised an error" not in row.reason


def test_a_row_is_one_line_of_limited_length():
    assert plain("a\nb\x1b[0m\u202e") == r"a\nb\x1b[0m\u202e"
    assert len(plain("\x1b" * 10_000)) == 400
    assert some(["a", "b", "c", "d"]) == "a, b, c and 1 more"
