"""A .pt file is data: whatever it holds, nothing in it is executed and the process stays as it was."""

from __future__ import annotations

import builtins
import functools
import io
import operator
import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.training_state import TrainingStateManager


class Call:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def gadgets(proof):
    touch = f"open({str(proof)!r}, 'w').close()"
    return {
        "system": Call(os.system, f"touch {proof}"),
        "eval": Call(builtins.eval, touch.removesuffix(".close()")),
        "exec": Call(builtins.exec, touch),
        "popen": Call(subprocess.Popen, ["touch", str(proof)]),
        "open": Call(builtins.open, str(proof), "w"),
        "getattr": Call(builtins.getattr, "text", "upper"),
        "partial": Call(functools.partial, os.mkdir, str(proof)),
        "caller": Call(operator.methodcaller, "mkdir"),
        "runpy": Call(__import__, "antigravity"),
        "torch load": Call(torch.load, str(proof)),
        "torch hub": Call(torch.hub.load, "x/y", "z"),
        "storage": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, str(proof)))),
        "numpy load": Call(np.load, str(proof), None, True),
        "numpy file": Call(np.memmap, str(proof), "u1", "w+", 0, (10,)),
        "type": Call(type, "X", (), {}),
    }


def process_state():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes(), os.getcwd()


def original(**more):
    return {
        "epoch": 1,
        "step": 1,
        "torch_rng_state": torch.get_rng_state(),
        "numpy_rng_state": np.random.get_state(),
        "python_rng_state": random.getstate(),
    } | more


@pytest.mark.parametrize("gadget", gadgets("x"))
@pytest.mark.parametrize("place", ["whole", "ours", "original", "key"])
def test_a_gadget_is_refused_and_not_run(tmp_path, gadget, place):
    proof = tmp_path / "proof"
    bomb = gadgets(proof)[gadget]
    content = {
        "whole": bomb,
        "ours": {"epoch": bomb, "hf_lifecycle": {"format": 1, "kind": "training_state", "digest": "", "tensors": {}}},
        "original": original(custom_state={"x": bomb}),
        "key": original(custom_state={(1, bomb): 2}),
    }[place]
    torch.save(content, tmp_path / "a.pt")
    before, modules = process_state(), set(sys.modules)
    with pytest.raises(StateFileError) as caught:
        TrainingStateManager().load_state(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(caught.value)
    with pytest.raises(StateFileError):
        read_tree(tmp_path / "a.pt", kind="training_state")
    assert process_state() == before
    assert not proof.exists()
    assert "antigravity" not in set(sys.modules) - modules


def test_a_hand_written_pickle_in_the_archive_is_refused(tmp_path):
    proof = tmp_path / "proof"
    torch.save({"epoch": 1}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    for program in (
        b"cos\nmkdir\n(S'" + bytes(proof) + b"'\ntR.",
        b"(S'" + bytes(proof) + b"'\nios\nmkdir\n.",
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(\x8c\x01xtR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cos\nPathLike\n(I0\ntS'b'\ntR.",
        b"(" * 100_000 + b".",
        b"]" + b"]a" * 10 + b"R.",
        b".",
        b"",
    ):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, program if name.endswith("data.pkl") else content)
        before = process_state()
        with pytest.raises(StateFileError):
            TrainingStateManager().load_state(tmp_path / "a.pt")
        assert process_state() == before
    assert not proof.exists()


@pytest.mark.parametrize(
    "content",
    [b"\0" * 64, b"PK\x03\x04", b"{}", b"\x80\x02.", os.urandom(4096), pickle.dumps([1]), b"PK\x05\x06" + b"\0" * 18],
)
def test_what_is_no_torch_file_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    before = process_state()
    with pytest.raises(StateFileError):
        TrainingStateManager().load_state(tmp_path / "a.pt")
    assert process_state() == before


def test_a_tensor_that_asks_for_more_memory_than_it_brings_is_refused(tmp_path):
    header = {"format": 1, "kind": "k", "digest": "", "tensors": {"x": torch.ones(1).expand(2**40)}}
    torch.save({"x": 1, "hf_lifecycle": header}, tmp_path / "a.pt")
    with pytest.raises(StateFileError):
        read_tree(tmp_path / "a.pt", kind="k")


def test_other_programs_files_are_named_as_such(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(StateFileError, match="not one of hf_lifecycle"):
        TrainingStateManager().load_state(tmp_path / "a.pt")
    buffer = io.BytesIO()
    torch.save({"epoch": 1, "model": {}}, buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(StateFileError, match="not one of hf_lifecycle"):
        TrainingStateManager().load_state(tmp_path / "a.pt")
