"""A snapshot laid out like its files is written from where it lies, or through blocks; the bytes are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_lifecycle.saving.files.archive import TorchArchive, plain_copy
from hf_lifecycle.saving.files.checkpoint_files import Files, plan_of_archive, plan_of_layout
from hf_lifecycle.saving.files.direct import Blocks
from hf_lifecycle.saving.files.layout import SafetensorsLayout, learn
from hf_lifecycle.saving.snapshots.async_capture import SnapshotMemory
from hf_lifecycle.saving.snapshots.image import Image
from hf_lifecycle.saving.snapshots.live import live_tensors, model_tensors, tensors_in
from hf_lifecycle.saving.snapshots.snapshot import Snapshot


class Training:
    """A model with a buffer, an odd and a tied tensor, and its optimizer; what is saved of them, and how."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.ModuleDict({"first": torch.nn.Linear(33, 65), "norm": torch.nn.BatchNorm1d(65)})
        self.model["last"] = torch.nn.Linear(33, 65)
        self.model["last"].weight = self.model["first"].weight
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.memory = SnapshotMemory()
        self.step()
        self.save_model(folder / "first.safetensors")
        self.layout: SafetensorsLayout = learn(folder / "first.safetensors", live_tensors(self.model))
        self.memory.prepare(
            self.tensors(self.state()),
            [
                plan_of_layout("model.safetensors", self.layout, live_tensors(self.model)),
                plan_of_archive("optimizer.pt", TorchArchive(self.state(), "optimizer")),
            ],
        )

    def step(self) -> None:
        self.model["norm"](self.model["first"](torch.randn(4, 33))).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_model(self, path: Path) -> None:
        state = self.model.state_dict().items()
        tensors = {name: one.contiguous() for name, one in state if name != "last.weight"}
        save_file(tensors, path, metadata={"format": "pt"})

    def state(self) -> Any:
        return plain_copy(self.optimizer.state_dict())

    def tensors(self, state: Any) -> Any:
        return [*model_tensors(live_tensors(self.model), self.layout.names), *tensors_in(state, "optimizer")]

    def stock(self, folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        self.save_model(folder / "model.safetensors")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        return contents(folder)

    def written(self, folder: Path, blocks: Blocks) -> tuple[dict[str, bytes], Snapshot]:
        state = self.state()
        taken = self.memory.take(self.tensors(state))
        files = Files(folder, blocks)
        taken.wait()
        files.layout("model.safetensors", self.layout, taken.named, taken.image("model.safetensors"))
        files.archive("optimizer.pt", TorchArchive(state, "optimizer"), taken)
        return contents(folder), taken


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Seen(Blocks):
    """Blocks that remember which files were written from an image."""

    def __init__(self) -> None:
        super().__init__(block=1 << 13)
        self.from_image: list[str] = []

    def file(self, path: Path, image: Any = None) -> Any:
        self.from_image += [path.name] if image is not None else []
        return super().file(path, image)


@pytest.fixture
def blocks() -> Iterator[Seen]:
    made = Seen()
    yield made
    made.close()


def test_files_are_written_from_where_the_copies_lie_save_after_save(tmp_path: Path, blocks: Seen) -> None:
    training = Training(tmp_path)
    for number in range(3):
        training.step()
        written, taken = training.written(tmp_path / f"ours {number}", blocks)
        assert written == training.stock(tmp_path / f"stock {number}")
        for name, tensor in live_tensors(training.model).items():  # what is digested afterwards
            assert torch.equal(taken.named(name), tensor), name
        for one in training.tensors(training.state()):
            assert torch.equal(taken.named(one.name), one.tensor), one.name
    assert blocks.from_image == ["model.safetensors", "optimizer.pt"] * 3


def state_that_grew(training: Training) -> None:
    training.optimizer.param_groups[0]["note"] = "x" * 200


def state_that_is_less(training: Training) -> None:
    del training.optimizer.state[training.model["norm"].weight]


def tensor_that_lies_otherwise(training: Training) -> None:
    weight = training.model["first"].weight
    weight.data = weight.data.t().contiguous().t()


CHANGES: dict[str, tuple[Callable[[Training], None], list[str]]] = {
    "state_that_grew": (state_that_grew, ["model.safetensors"]),
    "state_that_is_less": (state_that_is_less, []),  # there are fewer tensors: the memory is made anew
    "tensor_that_lies_otherwise": (tensor_that_lies_otherwise, ["optimizer.pt"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_more_as_it_was_planned_goes_through_blocks(change: str, tmp_path: Path, blocks: Seen) -> None:
    training = Training(tmp_path)
    make, from_image = CHANGES[change]
    make(training)
    written, taken = training.written(tmp_path / "ours", blocks)
    assert written == training.stock(tmp_path / "stock")
    assert blocks.from_image == from_image
    for name, tensor in live_tensors(training.model).items():
        assert torch.equal(taken.named(name), tensor), name


def test_image_holds_only_a_file_whose_every_tensor_is_at_its_place() -> None:
    memory = np.zeros(8192, np.uint8)
    image = Image(memory, 5000, 2)
    first, second, elsewhere = memory[8:16], memory[100:300], np.zeros(50, np.uint8)
    assert image.holds(5000, [(8, first), (100, second)])
    assert image.holds(5000, [(8, first), (20, elsewhere), (100, second)])
    assert not image.holds(5001, [(8, first), (100, second)])
    assert not image.holds(5000, [(8, first), (108, second)])
    assert not image.holds(5000, [(8, first)])  # what lies there beside it would be written over
    assert not image.holds(5000, [(8, first), (100, elsewhere)])
