"""What a host wrote is compared with digests of what it was made of: any byte that is another is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_lifecycle.checkpoint.files.regular import digest_file
from hf_lifecycle.saving.files.archive import TorchArchive, plain_copy
from hf_lifecycle.saving.files.comparison import Comparison, comparison_of_archive, comparison_of_layout
from hf_lifecycle.saving.files.layout import NotLearned, layout_by_name
from hf_lifecycle.saving.snapshots.live import live_tensors, tensors_in
from hf_lifecycle.state.fingerprint import leaf_digests, tensor_digest


class Tied(nn.Module):
    """With a tensor under two names, one that does not lie in order, one element, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3)
        self.second = nn.Linear(5, 3, bias=False)
        self.second.weight = self.first.weight
        self.turned = nn.Parameter(torch.rand(4, 6).t())
        self.short = nn.Parameter(torch.rand(7).to(torch.bfloat16))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", torch.empty(0, 2))


def model_file(folder: Path) -> tuple[Comparison, dict[str, str]]:
    model = Tied()
    live = live_tensors(model)
    named = {name: one.detach().contiguous() for name, one in live.items() if name != "first.weight"}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    layout = layout_by_name(folder / "model.safetensors", live)
    assert layout is not None
    digests = {name: tensor_digest(one) for name, one in live.items() if name != "second.weight"}
    return comparison_of_layout("model.safetensors", layout, live), digests


def optimizer_file(folder: Path) -> tuple[Comparison, dict[str, str]]:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 5)).sum().backward()
    optimizer.step()
    state = plain_copy(optimizer.state_dict())
    torch.save(state, folder / "optimizer.pt")
    tensors = tensors_in(state, "optimizer")
    comparison = comparison_of_archive("optimizer.pt", TorchArchive(state, "optimizer"), tensors)
    assert comparison is not None
    return comparison, leaf_digests(state, "optimizer")


@pytest.mark.parametrize("make", [model_file, optimizer_file])
def test_file_as_it_was_written_is_told_with_its_digest(make: object, tmp_path: Path) -> None:
    comparison, digests = make(tmp_path)  # type: ignore[operator]
    entry = comparison.run(tmp_path, digests)
    path = tmp_path / comparison.name
    assert (entry.path, entry.size, entry.xxh3_128) == (comparison.name, path.stat().st_size, digest_file(path))


@pytest.mark.parametrize("make", [model_file, optimizer_file])
def test_any_other_byte_is_found(make: object, tmp_path: Path) -> None:
    comparison, digests = make(tmp_path)  # type: ignore[operator]
    path = tmp_path / comparison.name
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else 0  # its header is repeated
    for place in [*range(begin, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(NotLearned):
            comparison.run(tmp_path, digests)
    for other in (whole[:-1], whole[: len(whole) // 2], whole + b"\0", b""):
        path.write_bytes(other)
        with pytest.raises(NotLearned):
            comparison.run(tmp_path, digests)


def test_tensor_of_another_moment_is_found(tmp_path: Path) -> None:
    comparison, digests = model_file(tmp_path)
    with pytest.raises(NotLearned, match="short in it differs from the state of the training"):
        comparison.run(tmp_path, {**digests, "short": tensor_digest(torch.zeros(7, dtype=torch.bfloat16))})
    with pytest.raises(NotLearned, match="count in it differs from the state of the training"):
        comparison.run(tmp_path, {name: digest for name, digest in digests.items() if name != "count"})


def test_layout_by_name_is_none_for_other_names_and_sizes(tmp_path: Path) -> None:
    live = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for file in ({"a": torch.zeros(2), "c": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(3).half()}):
        save_file(file, tmp_path / "model")
        assert layout_by_name(tmp_path / "model", live) is None


def test_archive_whose_tensors_share_memory_is_not_compared_later() -> None:
    both = torch.zeros(6)
    for state in ({"a": both[:3], "b": both[3:]}, {"a": torch.zeros(2, 3).t()}):
        assert comparison_of_archive("x.pt", TorchArchive(state, "x"), tensors_in(state, "x")) is None
