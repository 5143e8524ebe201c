"""An archive is, byte for byte, what torch.save writes; whatever the tree, and beyond 4 GiB."""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lifecycle.saving.files.archive import ArchiveOfOne, TorchArchive, plain_copy
from hf_lifecycle.saving.files.zip_stream import ZipStream


class Collected:
    """A sink that keeps the bytes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Any, /) -> None:
        self.data += bytes(data)


def live_bytes(storage: torch.UntypedStorage) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def archived(tree: Any, name: str) -> bytes:
    sink = Collected()
    TorchArchive(tree, name).write(sink, live_bytes)
    return bytes(sink.data)


def trained(kind: type[torch.optim.Optimizer], **settings: Any) -> torch.optim.Optimizer:
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))
    optimizer = kind(model.parameters(), **settings)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 7)).sum().backward()
        optimizer.step()
    return optimizer


def two_groups() -> torch.optim.Optimizer:
    """Groups that have one tuple of betas in common, as torch makes them."""
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    return torch.optim.AdamW([{"params": [first]}, {"params": [second], "weight_decay": 0.0}])


def one_rate_for_two_groups() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(number))]} for number in (2, 3)]
    return torch.optim.SGD(groups, lr=torch.tensor(0.1))


shared = torch.arange(12.0)

TREES: dict[str, Any] = {
    "adamw": lambda: trained(torch.optim.AdamW, lr=1e-3).state_dict(),
    "shared_betas": lambda: two_groups().state_dict(),
    "shared_rate": lambda: one_rate_for_two_groups().state_dict(),
    "sgd_momentum": lambda: trained(torch.optim.SGD, lr=0.1, momentum=0.9).state_dict(),
    "adafactor": lambda: trained(torch.optim.Adafactor).state_dict(),
    "empty": lambda: {"state": {}, "param_groups": []},
    "no_elements": lambda: [torch.empty(0), torch.empty(3, 0), torch.ones(3)],
    "shared_storage": lambda: {"all": shared, "part": shared[2:5], "turned": shared.view(3, 4).t()},
    "types": lambda: [torch.zeros(3, dtype=kind) for kind in (torch.bfloat16, torch.int8, torch.bool, torch.complex64)],
    "parameter": lambda: OrderedDict(weight=torch.nn.Parameter(torch.ones(2))),
    "big_record": lambda: [torch.randn(400_000)],
}


@pytest.mark.parametrize("name", TREES)
def test_bytes_are_those_of_torch_save(name: str, tmp_path: Path) -> None:
    tree = TREES[name]()
    file = tmp_path / f"{name}.pt"
    torch.save(tree, file)
    assert archived(plain_copy(tree), name) == file.read_bytes()


def test_layout_beyond_four_gigabytes_is_torchs(tmp_path: Path) -> None:
    """torch itself lays out 4.6 GB of nothing, as a sparse file; the bytes before and after it must be the same."""
    tree = [torch.ones(10), torch.empty(1150 << 20, dtype=torch.float32), torch.ones(5)]
    file = tmp_path / "wide.pt"
    with torch.serialization.skip_data():
        torch.save(tree, file)
    with zipfile.ZipFile(file) as archive:
        records = {entry.filename: (entry.file_size, entry.header_offset) for entry in archive.infolist()}

    class Positions:
        """Keeps what is small, so that nothing of 4 GB is ever held."""

        def __init__(self) -> None:
            self.position, self.small = 0, {}

        def write(self, data: Any, /) -> None:
            self.small[self.position] = bytes(data)
            self.position += len(data)

    sink = Positions()
    stream = ZipStream(sink, 64)
    names = list(records)
    with open(file, "rb") as real:
        for name in names:
            size, offset = records[name]
            assert stream._position == offset, name
            if size > 1 << 30:
                size, real_size = 0, size
                _skip(stream, sink, name, real_size)
                continue
            stream.add(name, b"\0" * size)
            head = sink.small[offset]
            real.seek(offset)
            assert real.read(len(head)) == head, name
    begin = stream._position
    stream.close()
    tail = b"".join(data for position, data in sorted(sink.small.items()) if position >= begin)
    with open(file, "rb") as real:
        real.seek(begin)
        expected = real.read()
    assert len(tail) == len(expected)
    assert tail[-98:] == expected[-98:], "the ends of the archive differ"


def _skip(stream: ZipStream, sink: Any, name: str, size: int) -> None:
    class Nothing:
        """So many zeros, without the memory for them."""

        def __len__(self) -> int:
            return size

    data = Nothing()
    add, stream._sink = stream.add, sink
    import hf_lifecycle.saving.files.zip_stream as module

    real = memoryview

    class View:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getitem__(self, item: slice) -> Any:
            sink.position += min(item.stop, size) - item.start
            return b""

    module.memoryview = lambda inner: View(inner) if isinstance(inner, Nothing) else real(inner)
    try:
        add(name, data)  # type: ignore[arg-type]
    finally:
        del module.memoryview


def test_file_loads_without_running_code(tmp_path: Path) -> None:
    optimizer = trained(torch.optim.AdamW)
    file = tmp_path / "optimizer.pt"
    file.write_bytes(archived(optimizer.state_dict(), "optimizer"))
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


def test_tree_copied_plainly_stays_as_it_was() -> None:
    optimizer = trained(torch.optim.AdamW)
    copy = plain_copy(optimizer.state_dict())
    before = archived(copy, "optimizer")
    optimizer.param_groups[0]["lr"] = 7.0
    state = next(iter(optimizer.state.values()))
    state["more"] = 1
    assert archived(copy, "optimizer") == before


def test_what_might_change_is_not_copied_plainly() -> None:
    class Counter:
        pass

    with pytest.raises(TypeError, match="Counter"):
        plain_copy({"state": {0: Counter()}})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.arange(7),
        torch.linspace(0, 1, 15).view(3, 5),
        torch.ones(3, 1, 2, dtype=torch.bfloat16),
        torch.arange(1 << 19, dtype=torch.float32),  # more than one block
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_archive_of_one_tensor_has_the_bytes_of_torchs_for_any_values(tensor: torch.Tensor, tmp_path: Path) -> None:
    kind = ArchiveOfOne(tensor.dtype, tensor.shape, "archive")
    for values in (tensor, torch.zeros_like(tensor)):
        sink = Collected()
        kind.write(sink, values.view(-1).view(torch.uint8).numpy())
        torch.save(values, stream := io.BytesIO())
        assert bytes(sink.data) == stream.getvalue()
