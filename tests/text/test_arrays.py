"""arrays.py: flat arrays in one file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentence_classifier.errors import InputError
from text.arrays import CODES, ArrayWriter, fingerprint, has_fingerprint, open_arrays

ROOT = Path(__file__).parents[2]


def write_small(path: Path) -> None:
    with ArrayWriter(path, {"flags": ("u1", ()), "ids": ("i4", ()), "offsets": ("i8", ()), "rows": ("f4", (3,)),
                            "none": ("f8", (2,))}) as writer:
        for number in range(4):
            writer.append("ids", np.arange(number, dtype="i4"))
            writer.append("rows", np.full((number, 3), number, "f4"))
            writer.append("offsets", np.array([number]))
            writer.append("flags", np.array([7], "u1"))
        writer.metadata["words"] = "a\u2028é\nb"


def build(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    write_small(tmp_path / "folder" / "a")
    arrays, metadata = open_arrays(tmp_path / "folder" / "a")
    assert arrays["ids"].tolist() == [0, 0, 1, 0, 1, 2]
    assert arrays["offsets"].tolist() == [0, 1, 2, 3] and arrays["flags"].tolist() == [7] * 4
    assert arrays["rows"].tolist() == [[1] * 3] + [[2] * 3] * 2 + [[3] * 3] * 3
    assert arrays["none"].shape == (0, 2) and arrays["none"].dtype == np.float64
    assert all(array.flags.aligned for array in arrays.values())
    assert metadata == {"words": "a\u2028é\nb"}
    assert os.listdir(tmp_path / "folder") == ["a"]


def test_no_array_at_all(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path / "a", {}):
        pass
    assert open_arrays(tmp_path / "a") == ({}, {})


def test_the_safetensors_library_reads_it_and_is_read(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    write_small(tmp_path / "a")
    ours = open_arrays(tmp_path / "a")[0]
    theirs = numpy.load_file(tmp_path / "a")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name])
    numpy.save_file({"x": np.ones((2, 3), "f2"), "y": np.arange(3)}, tmp_path / "b", {"key": "value"})
    arrays, metadata = open_arrays(tmp_path / "b")
    assert arrays["x"].tolist() == [[1] * 3] * 2 and arrays["y"].tolist() == [0, 1, 2] and metadata == {"key": "value"}


def test_writing_to_a_map_reaches_neither_the_file_nor_torch_warnings(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_small(tmp_path / "a")
    arrays, _ = open_arrays(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["ids"][0] = 99
    assert arrays["ids"][0] == 99 and open_arrays(tmp_path / "a")[0]["ids"][0] == 0


@given(st.lists(st.tuples(st.sampled_from(sorted(CODES, key=str)), st.lists(st.integers(0, 3), max_size=2),
                          st.lists(st.integers(0, 4), max_size=3)), max_size=4))
@settings(max_examples=30, deadline=None)
def test_any_columns_in_any_order(tmp_path_factory: pytest.TempPathFactory, columns: list) -> None:
    path = tmp_path_factory.mktemp("columns") / "a"
    parts = {f"c{number}": [np.full((rows, *shape), number, dtype) for rows in lengths]
             for number, (dtype, shape, lengths) in enumerate(columns)}
    with ArrayWriter(path, {f"c{n}": (dtype, tuple(shape)) for n, (dtype, shape, _) in enumerate(columns)}) as writer:
        for turn in range(3):
            for name, arrays in parts.items():
                if turn < len(arrays):
                    writer.append(name, arrays[turn])
    read, _ = open_arrays(path)
    for number, (dtype, shape, lengths) in enumerate(columns):
        assert read[f"c{number}"].dtype == dtype and read[f"c{number}"].shape == (sum(lengths), *shape)
        assert (read[f"c{number}"] == number).all() and read[f"c{number}"].flags.aligned


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bool"), ArrayWriter(tmp_path / "a", {"x": ("bool", ())}):
        pass
    for wrong in (np.ones(2, "i8"), np.ones(2, "f4")):
        with pytest.raises(TypeError), ArrayWriter(tmp_path / "a", {"x": ("i4", ())}) as writer:
            writer.append("x", wrong)
    for shape in ((), (2,), (2, 4)):
        with pytest.raises(ValueError, match="shape"), ArrayWriter(tmp_path / "a", {"x": ("i4", (3,))}) as writer:
            writer.append("x", np.ones(shape, "i4"))
    with pytest.raises(TypeError, match="strings"), ArrayWriter(tmp_path / "a", {}) as writer:
        writer.metadata["x"] = 1  # type: ignore[assignment]
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_what_stood_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(KeyError, match="boom"), ArrayWriter(tmp_path / "a", {"x": ("i4", ())}) as writer:
        writer.append("x", np.ones(2, "i4"))
        raise KeyError("boom")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_a_full_disk_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("before")
    monkeypatch.setattr("text.arrays.shutil.copyfileobj", full)
    with pytest.raises(InputError, match="No space"):
        write_small(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = ("import os, signal, sys, numpy as np; from text.arrays import ArrayWriter\n"
            "with ArrayWriter(sys.argv[1], {'x': ('i4', ())}) as writer:\n"
            "    writer.append('x', np.ones(100_000, 'i4'))\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL and os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), ArrayWriter(tmp_path / "file" / "a", {"x": ("i4", ())}):
        pass


X = {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}
TWO = b"12345678"  # data of X


@pytest.mark.parametrize("content", [
    b"", b"1234567", build(b"{"), build(b"[]"), build(b"\xff"), build(b"[" * 100_000),
    (1 << 63).to_bytes(8, "little") + b"{}", b"a plain text file, longer than a header's length\n" * 9,
    build({"x": X}, TWO)[1:], build({"x": X}, TWO[1:]), build({"x": X}, TWO + b"9"),
    build({"x": [1]}), build({"__metadata__": {"a": 1}}),
    build({"x": X | {"dtype": "F8"}}, TWO), build({"x": X | {"data_offsets": [0.0, 8]}}, TWO),
    build({"x": X | {"shape": [3]}}, TWO), build({"x": X | {"shape": [-1, -2]}}, TWO),
    build({"x": X | {"shape": [True, 2]}}, TWO), build({"x": X | {"shape": [0, 1 << 70], "data_offsets": [0, 0]}}),
    build({"x": X, "y": X}, TWO), build({"x": X, "y": X | {"data_offsets": [12, 20]}}, b"1" * 20),
])
def test_what_is_no_such_file_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=r"^\S+/a: not a usable file of arrays \(.+\); make it again\.$"):
        open_arrays(tmp_path / "a")


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            open_arrays(path)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_gives_an_input_error_or_whole_arrays(tmp_path_factory: pytest.TempPathFactory,
                                                         data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    if not path.exists():
        write_small(path.with_name("whole"))
    content = bytearray(path.with_name("whole").read_bytes())
    if data.draw(st.booleans()):
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789,"[]{}:'))
        content = content[:data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    else:
        values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
                              | st.sampled_from(["I32", "F64"]), lambda inner: st.lists(inner, max_size=3))
        entries = st.fixed_dictionaries({"dtype": values, "shape": values, "data_offsets": values}) | values
        content = bytearray(build(data.draw(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries)),
                                  data.draw(st.binary(max_size=16))))
    path.write_bytes(content)
    try:
        arrays, metadata = open_arrays(path)
    except InputError:
        return
    assert all(isinstance(value, str) for value in metadata.values())
    for array in arrays.values():
        array.copy()


@given(own=st.integers(0, 3000), row=st.integers(0, 2999))
def test_each_own_row_decides_about_a_fingerprint(own: int, row: int) -> None:
    table = np.random.default_rng(0).normal(size=(3000, 2)).astype("f4")
    name = fingerprint(table, own)
    assert has_fingerprint(table, name)
    table[row, 1] += 1
    assert not has_fingerprint(table, name) or row >= own
    assert not has_fingerprint(table[:-1], name) and not has_fingerprint(table, "None")


def test_fingerprints_of_earlier_checkpoints_are_known() -> None:
    assert has_fingerprint(np.ones((5, 2), "f4"), fingerprint(np.ones((5, 2), "f4")))
    assert fingerprint(np.ones((5, 2), "f4")) == "a6ebf37e905d767115bf3b9b951c1136"
