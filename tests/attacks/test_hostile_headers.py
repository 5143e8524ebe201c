"""A .safetensors header is a claim: each claim is checked against the file before it is believed."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from hf_lifecycle.checkpoint.files.statefile import read_structure, read_tree, write_tree
from hf_lifecycle.checkpoint.files.structure import dump, seal
from hf_lifecycle.errors import StateFileError

TREE = {"a": torch.arange(4.0), "b": np.arange(3, dtype=np.int16), "n": 1}


def taken_apart(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def refused(path, match=None):
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    with pytest.raises(StateFileError, match=match) as caught:
        read_tree(path, kind="test")
    assert str(path) in str(caught.value)
    assert before == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tree(path, TREE, kind="test")
    return path


@pytest.mark.parametrize("length", [0, 1, 10**6, 100_000_001, 2**63 - 1, 2**64 - 1])
def test_a_header_of_another_length_is_refused(path, length):
    header, data = taken_apart(path)
    put_together(path, header, data, length)
    refused(path)


ENTRIES = {
    "out of range": {"data_offsets": [0, 2**62]},
    "negative": {"data_offsets": [-16, 0]},
    "backwards": {"data_offsets": [16, 0]},
    "overlap": {"data_offsets": [8, 24]},
    "gap": {"data_offsets": [1, 17]},
    "short": {"data_offsets": [0, 15]},
    "floats": {"data_offsets": [0.0, 16.0]},
    "bools": {"data_offsets": [False, 16]},
    "one": {"data_offsets": [0]},
    "text": {"data_offsets": "0-16"},
    "shape": {"shape": [5]},
    "negative shape": {"shape": [-2, -2]},
    "huge shape": {"shape": [2**40, 2**40]},
    "shape of bools": {"shape": [True, 4]},
    "no shape": {"shape": None},
    "type": {"dtype": "I32"},
    "unknown type": {"dtype": "F33"},
    "no type": {"dtype": None},
    "list for type": {"dtype": []},
}


@pytest.mark.parametrize("change", ENTRIES.values(), ids=ENTRIES)
def test_a_tensor_that_lies_about_its_place_is_refused(path, change):
    header, data = taken_apart(path)
    header["a"] |= change
    put_together(path, header, data)
    refused(path)


def test_tensors_that_share_bytes_that_are_missing_or_that_nobody_asked_for_are_refused(path):
    header, data = taken_apart(path)
    put_together(path, header | {"c": header["a"]}, data)
    refused(path)
    put_together(path, header | {"c": {"dtype": "U8", "shape": [2], "data_offsets": [22, 24]}}, data + b"ab")
    refused(path, "nothing refers to")
    put_together(path, {key: value for key, value in header.items() if key != "b"}, data[:16])
    refused(path, "missing")
    put_together(path, header | {"a": [1]}, data)
    refused(path)
    put_together(path, header, data + b"more")
    refused(path, "torn")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"1",
        b"null",
        b"{",
        b"{}",
        b'{"a":NaN}',
        b"\xff" * 8,
        b"[" * 200_000,
        b'{"a":1,"a":2}',
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"hf_lifecycle.format":1}}',
        b"1" * 5000,
    ],
)
def test_a_header_that_is_none_is_refused(path, text):
    put_together(path, text, b"")
    refused(path)


def sealed(path, node):
    """A whole, sealed file with the structure ``node``: the work of someone who can write files."""
    text = node if isinstance(node, str) else dump(node)
    meta = {"hf_lifecycle.format": "1", "hf_lifecycle.kind": "test", "hf_lifecycle.structure": text}
    put_together(path, {"__metadata__": meta | {"hf_lifecycle.digest": seal("test", text)}}, b"")


STRUCTURES = {
    "unknown tag": {"a": {"$exec": "1"}},
    "no such tensor": {"a": {"$tensor": "x", "dtype": "float32", "shape": [1], "xxh3": ""}},
    "tensor without fields": {"a": {"$tensor": "x"}},
    "name that is none": {"a": {"$tensor": [], "dtype": "float32", "shape": [1], "xxh3": ""}},
    "object array": {"a": {"$scalar": "|O8", "hex": "0" * 16}},
    "text scalar": {"a": {"$scalar": "<U1", "hex": "0" * 8}},
    "broken scalar": {"a": {"$scalar": "<f8", "hex": "0"}},
    "empty scalar": {"a": {"$scalar": "<f8", "hex": ""}},
    "no type": {"a": {"$scalar": "nothing", "hex": ""}},
    "no torch type": {"a": {"$dtype": "load"}},
    "no device": {"a": {"$device": "gpu of mine"}},
    "no size": {"a": {"$size": ["x"]}},
    "no integer": {"a": {"$int": "zz"}},
    "short float": {"a": {"$float": "00"}},
    "pairs that are none": {"a": {"$dict": [[1, 2, 3]]}},
    "unhashable key": {"a": {"$dict": [[[], 1]]}},
    "no tuple": {"a": {"$tuple": 5}},
    "deep": '{"a":' + "[" * 400 + "]" * 400 + "}",
    "very deep": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "twice": '{"a":1,"a":2}',
}


@pytest.mark.parametrize("node", STRUCTURES.values(), ids=STRUCTURES)
def test_a_sealed_structure_that_means_nothing_is_refused(path, node):
    sealed(path, node)
    refused(path)


def test_a_sealed_root_that_is_no_dict_is_refused(path):
    for text in ("1", "[]", "null", '{"$tuple":[]}'):
        sealed(path, text)
        refused(path)
        with pytest.raises(StateFileError):
            read_structure(path)
