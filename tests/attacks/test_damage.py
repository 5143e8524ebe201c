"""Torn and flipped files: damage is found, or is where it changes nothing; it never becomes a wrong value."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch

from hf_lifecycle.checkpoint.files.statefile import read_structure, read_tree, write_tree
from hf_lifecycle.checkpoint.files.structure import dump
from hf_lifecycle.checkpoint.files.tree import encode
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.training_state import TrainingStateManager

TREE = {
    "epoch": 3,
    "loss": 0.125,
    "flags": (True, None, "text", b"bytes", 10**30, float("nan")),
    "weights": torch.arange(12.0).reshape(3, 4),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "words": np.arange(5, dtype=np.uint32),
    "keys": {1: "a", 2: [1.5, np.float64(2.5)]},
}


def bits(tree):
    """All of a tree, with the digests of its tensors, as one text."""
    return dump(encode(tree)[0])


def process_state():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


@pytest.fixture(params=[".pt", ".safetensors"])
def path(request, tmp_path):
    path = tmp_path / f"a{request.param}"
    write_tree(path, TREE, kind="test")
    return path


def test_a_file_cut_at_any_length_is_refused(path):
    whole = path.read_bytes()
    before = process_state()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StateFileError):
            read_tree(path, kind="test")
    assert process_state() == before


def test_a_bit_flipped_at_any_byte_is_found_or_changes_nothing(path):
    whole = path.read_bytes()
    expected, before = bits(TREE), process_state()
    harmless = 0
    for index in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << (index % 8)
        path.write_bytes(damaged)
        try:
            tree = read_tree(path, kind="test")
        except StateFileError:
            continue
        assert bits(tree) == expected, index
        harmless += 1
    # torch's archive has padding and fields that nobody reads; in a safetensors file there is only "format": "pt".
    assert harmless < (len(whole) // 6 if path.suffix == ".pt" else 10)
    assert process_state() == before


def test_a_block_of_zeros_anywhere_is_found_or_changes_nothing(path):
    whole = path.read_bytes()
    expected = bits(TREE)
    for start in range(0, len(whole), 32):
        path.write_bytes(whole[:start] + b"\0" * len(whole[start : start + 64]) + whole[start + 64 :])
        with contextlib.suppress(StateFileError):
            assert bits(read_tree(path, kind="test")) == expected


def test_a_description_read_without_torch_is_damaged_nowhere(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tree(path, TREE, kind="test")
    whole, expected = path.read_bytes(), repr(read_structure(path))
    for index in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << (index % 8)
        path.write_bytes(damaged)
        with contextlib.suppress(StateFileError):
            assert repr(read_structure(path)) == expected


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_training_state_leaves_the_process_and_the_manager_as_they_were(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    manager = TrainingStateManager()
    manager.is_best(0.5)
    manager.save_state(path, epoch=1, step=1)
    whole = path.read_bytes()
    random.random(), np.random.rand(), torch.rand(1)
    before, best = process_state(), manager.state_dict()
    refused = 0
    for index in range(0, len(whole), 97):
        for damaged in (whole[:index], whole[:index] + bytes([whole[index] ^ 16]) + whole[index + 1 :]):
            path.write_bytes(damaged)
            try:
                manager.load_state(path)
            except StateFileError:
                refused += 1
                assert process_state() == before
                assert manager.state_dict() == best
            else:
                random.setstate(before[0])
                manager.load_state_dict(best)
                path.write_bytes(whole)
                manager.load_state(path)
                random.random(), np.random.rand(), torch.rand(1)
                manager.load_state_dict(best)
    assert refused > len(whole) // 97
