"""With pinned memory, batches come from workers through a thread, and so do the states that come with them.

Memory can be pinned only where there is an accelerator; here that thread runs without one, and pins nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, dataloader
from torch.utils.data._utils import pin_memory

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.data import stream_position
from hf_lifecycle.data.object_states import TrackedObjects
from hf_lifecycle.data.objects import DataObjects
from hf_lifecycle.data.stream_position import After, StreamPosition
from tests.trainer.runs import Rows, new_trainer, require_same_end


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the threads in which states arrived."""
    own_init = dataloader._BaseDataLoaderIter.__init__

    def init(self: Any, loader: Any) -> None:
        with monkeypatch.context() as while_it_looks:
            while_it_looks.setattr(torch.accelerator, "is_available", lambda: True)
            own_init(self, loader)

    monkeypatch.setattr(dataloader._BaseDataLoaderIter, "__init__", init)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setattr(pin_memory, "pin_memory", lambda data, device=None: data)
    seen: set[str] = set()
    own = stream_position.note

    def note(*given: Any) -> None:
        seen.add(threading.current_thread().name)
        own(*given)

    monkeypatch.setattr(stream_position, "note", note)
    return seen


class Counting(Dataset):
    """Rows with a target that counts what was fetched in this process."""

    def __init__(self) -> None:
        self.rows, self.count = Rows(), 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.count += 1
        return {**self.rows[index], "labels": torch.tensor(float(self.count))}

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Stream(IterableDataset):
    """The same rows as a stream that keeps its place."""

    def __init__(self) -> None:
        self.rows, self.place = Rows(32), 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        first, self.place = self.place or worker.id, 0
        for index in range(first, len(self.rows), worker.num_workers):
            self.place = index + worker.num_workers
            yield self.rows[index]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


@pytest.mark.parametrize("kind", [Counting, Stream])
def test_states_that_arrive_in_the_pinning_thread_are_those_of_their_batches(
    kind: Any, threads: set[str], tmp_path: Path
) -> None:
    def trainer(folder: str) -> Any:
        more = {"dataloader_num_workers": 2, "max_steps": 10}
        made = new_trainer(tmp_path / folder, LifecycleCallback(), train=kind(), **more)
        made.args.dataloader_pin_memory = True  # which is refused on a CPU
        return made

    require_same_end(trainer, step=7)
    assert threads - {"MainThread"}


class Late:
    """A number that is another one while it is compared: a pass begins in between, as another thread may do."""

    def __init__(self, number: int, begin: Any) -> None:
        self.number, self.begin = number, begin

    def __eq__(self, other: object) -> bool:
        same = self.number == other
        self.begin()
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]


def test_state_that_arrives_while_a_pass_begins_is_not_taken_for_one_of_it() -> None:
    side = TrackedObjects(DataObjects({}), workers=2, persistent=True, replays=False)
    side.begin(0)
    side.add(Late(0, lambda: side.begin(1)), 3, {"old": 1})  # type: ignore[arg-type]
    assert side._noted == {}
    position = StreamPosition(2)
    position.begin(0)
    position.add(Late(0, lambda: position.begin(1)), 0, 5, After(4))  # type: ignore[arg-type]
    assert all(reader.after == {} for reader in position._readers)
