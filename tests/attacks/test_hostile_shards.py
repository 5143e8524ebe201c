"""Files of FSDP and DeepSpeed run nothing on a resume: their own readers unpickle without asking, so we ask first."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lifecycle import StateFileError
from hf_lifecycle.checkpoint.directory.pickles import refused_pickles
from hf_lifecycle.hosts.accelerate.hooks import refuse_hostile


class Touch:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._proof),)


def write_shards(folder: Path, **more: Any) -> Path:
    """A folder as FSDP's sharded files are, with values that are no tensors."""
    import torch.distributed.checkpoint as dcp

    state = {"weight": torch.ones(3), "state": {"step": torch.tensor(2.0)}, "lr": 0.1, "betas": (0.9, 0.99), **more}
    dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
    return folder / ".metadata"


def refused(checkpoint: Path, *words: str) -> None:
    """Both hosts refuse it, with these words."""
    (problem,) = refused_pickles(checkpoint)
    with pytest.raises(StateFileError) as raised:
        refuse_hostile(checkpoint)
    for text in (problem, str(raised.value)):
        assert [word for word in words if word not in text] == [], text


def test_files_that_torch_writes_are_admitted(tmp_path: Path) -> None:
    write_shards(tmp_path / "optimizer_0")
    assert refused_pickles(tmp_path) == []
    refuse_hostile(tmp_path)


def test_metadata_that_runs_code_is_refused(tmp_path: Path) -> None:
    metadata, proof = write_shards(tmp_path / "optimizer_0"), tmp_path / "proof"
    whole = pickle.loads(metadata.read_bytes())
    for content in (Touch(proof), [whole, Touch(proof)]):
        metadata.write_bytes(pickle.dumps(content))
        refused(tmp_path, str(metadata), "mkdir, which could run code")
    assert not proof.exists()


def test_value_that_runs_code_is_refused(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    metadata = write_shards(tmp_path / "optimizer_0", eps=Touch(proof))
    refused(tmp_path, str(metadata), "optimizer.eps, in __0_0.distcp", "mkdir, which could run code")
    assert not proof.exists()


class Twofold(pickle._Pickler):
    """Fills an object once more, by slots, which pickle gives to the real class and a stand-in might miss."""

    def __init__(self, file: Any, target: Any, more: dict[str, Any]) -> None:
        super().__init__(file, protocol=4)
        self._target, self._more = target, more

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        super().save(obj, save_persistent_id)
        if obj is self._target:
            self._target = self  # once
            super().save((None, self._more))
            self.write(pickle.BUILD)


def test_place_that_is_told_twice_is_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    metadata, proof = write_shards(tmp_path / "optimizer_0"), tmp_path / "proof"
    whole = pickle.loads(metadata.read_bytes())
    (place,) = (place for index, place in whole.storage_data.items() if index.fqn == "optimizer.lr")
    shard = metadata.parent / place.relative_path
    evil = io.BytesIO()
    torch.save(Touch(proof), evil)
    begin = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + evil.getvalue())
    told = io.BytesIO()
    Twofold(told, place, {"offset": begin, "length": len(evil.getvalue())}).dump(whole)
    metadata.write_bytes(told.getvalue())
    refused(tmp_path, str(metadata), "_StorageInfo is filled in a way that torch does not write")
    assert not proof.exists()
    state = {"optimizer": {"weight": torch.zeros(3), "lr": 0.0}}
    dcp.load(state, checkpoint_id=metadata.parent, no_dist=True)  # the attack is real: torch's own reader runs it
    assert proof.exists()


def test_metadata_that_leads_outside_or_is_packed_or_torn_is_refused(tmp_path: Path) -> None:
    metadata = write_shards(tmp_path / "optimizer_0")
    content = metadata.read_bytes()
    for attribute, value, words in (
        ("relative_path", "../elsewhere", "which is outside"),
        ("transform_descriptors", ("stream.zstd",), "packed"),
        ("offset", -1, "listed at offset -1"),
    ):
        whole = pickle.loads(content)
        for place in whole.storage_data.values():
            setattr(place, attribute, value)
        metadata.write_bytes(pickle.dumps(whole))
        refused(tmp_path, words)
    for torn in (b"", content[:-9], b"\x80\x05N.", content.replace(b"storage_data", b"storage_date")):
        metadata.write_bytes(torn)
        refused(tmp_path, "not what torch.distributed.checkpoint writes")


def write_engine(file: Path, **more: Any) -> None:
    """A file that names a class of DeepSpeed's, which need not be installed."""
    module = "deepspeed.runtime.fp16.loss_scaler"
    parents = [".".join(module.split(".")[:number]) for number in range(1, 5)]
    scaler = type("LossScaler", (), {"__module__": module})
    with pytest.MonkeyPatch.context() as patch:
        for name in parents:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules[module], "LossScaler", scaler, raising=False)
        torch.save({"loss_scaler": scaler(), "step": 2, **more}, file)


def test_deepspeeds_files_may_name_its_own_classes_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.parent.mkdir()
    write_engine(file)
    assert refused_pickles(tmp_path) == []
    refuse_hostile(tmp_path)
    write_engine(file, more=Touch(tmp_path / "proof"))
    refused(tmp_path, str(file), "mkdir, which could run code")
    file.unlink()
    write_engine(tmp_path / "optimizer.bin")
    refused(tmp_path, "optimizer.bin", "LossScaler, which could run code")
    (tmp_path / "optimizer.bin").unlink()
    torch.save({"a": torch.zeros(2)}, file, pickle_protocol=4)  # with opcodes that torch does not write by itself
    refused(tmp_path, str(file), "not in the form that torch.save writes")
    assert not (tmp_path / "proof").exists()
