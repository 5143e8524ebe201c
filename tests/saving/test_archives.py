"""What an engine hands to ``torch.save`` is written later with the same bytes; of one that is made like DeepSpeed's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.files.direct import Blocks
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.sharded.archives import EngineTensors, handed_over, obstacle_to_engine, rest_of
from hf_lifecycle.saving.snapshots.async_capture import SnapshotMemory


class TorchCheckpointEngine:
    def save(self, state_dict: Any, path: str) -> None:
        torch.save(state_dict, path)


class LossScaler:
    scale = 8.0


class Optimizer:
    """Has a flat part of the weights, padded, and an optimizer of it."""

    def __init__(self) -> None:
        self.flat = torch.nn.Parameter(torch.arange(16.0))
        self.flat.grad = torch.ones(16)
        self.optimizer = torch.optim.AdamW([self.flat])
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.optimizer.state_dict(), "flat": [self.flat.detach()[:13]], "scaler": LossScaler()}


class Engine:
    """Writes the weights, and the state of its optimizer, as rank 0 of ZeRO-2 does."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        self.optimizer: Any = Optimizer()
        self.checkpoint_engine = TorchCheckpointEngine()
        self.steps = torch.tensor([3])  # nobody knows whose

    def zero_nvme_offload_optimizer(self) -> bool:
        return False

    def save_checkpoint(self, folder: Path) -> None:
        model = {"module": self.module.state_dict(), "steps": self.steps, "skipped": 0}
        part = {"optimizer_state_dict": self.optimizer.state_dict()}
        (folder / "global_step1").mkdir(parents=True, exist_ok=True)
        for name, tree in (("mp_rank_00_model_states.pt", model), ("zero_pp_rank_0_optim_states.pt", part)):
            self.checkpoint_engine.save(tree, str(folder / "global_step1" / name))

    def train(self) -> None:
        """Change all that is saved."""
        with torch.no_grad():
            for one in (*self.module.parameters(), *self.module.buffers(), self.optimizer.flat, self.steps):
                one.add_(1)
        self.optimizer.optimizer.step()


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.pt")}


def test_what_an_engine_hands_over_is_written_later_with_the_bytes_of_that_moment(tmp_path: Path) -> None:
    engine, memory = Engine(), SnapshotMemory()
    engine.save_checkpoint(tmp_path / "theirs")
    with handed_over([engine], is_written=False) as archives:
        engine.save_checkpoint(tmp_path / "ours")
    assert "save" not in vars(engine.checkpoint_engine)
    assert _files(tmp_path / "ours") == {}
    assert len(archives) == 2
    own = EngineTensors(engine)
    tensors = [*own.tensors, *rest_of(archives.values(), own.tensors)]
    assert {live.name for live in tensors if live.at_once} == {
        *(f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
        "mp_rank_00_model_states.pt, storage 7",
    }
    memory.prepare(tensors, [one.plan for one in archives.values()])
    snapshot = memory.take(tensors)
    snapshot.fence()
    engine.train()
    blocks = Blocks()
    try:
        files = Files(tmp_path / "ours", blocks)
        for one in archives.values():
            one.write(files, tmp_path / "ours", snapshot)
    finally:
        blocks.close()
        memory.close()
    assert snapshot.settled
    assert _files(tmp_path / "ours") == _files(tmp_path / "theirs")
    assert sorted(files.known) == [f"global_step1/{name}" for name in sorted(_files(tmp_path / "ours"))]


@pytest.mark.parametrize("place", [700, -400])  # in the pickle, and in the last tensor
def test_file_with_any_other_byte_than_expected_is_found(place: int, tmp_path: Path) -> None:
    engine = Engine()
    with handed_over([engine], is_written=True) as archives:
        engine.save_checkpoint(tmp_path)
    comparisons = [one.comparison(tmp_path) for one in archives.values()]
    engine.train()  # the comparison is made later
    for one in comparisons:
        entry = one.run(tmp_path, {})
        assert (entry.path, entry.size) == (one.name, (tmp_path / one.name).stat().st_size)
    content = bytearray((tmp_path / comparisons[1].name).read_bytes())
    content[place] ^= 1
    (tmp_path / comparisons[1].name).write_bytes(content)
    with pytest.raises(NotLearned):
        comparisons[1].run(tmp_path, {})


def test_engine_that_writes_otherwise_is_left_alone() -> None:
    engine = Engine()
    assert obstacle_to_engine(engine) is None
    engine.optimizer = None
    assert obstacle_to_engine(engine) == "DeepSpeed has no optimizer"
    engine.checkpoint_engine = object()  # type: ignore[assignment]
    assert obstacle_to_engine(engine) == "DeepSpeed writes its files by a object"
