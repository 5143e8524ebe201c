"""The generators of the devices are captured and restored, of all devices, before and after they are first used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_lifecycle.checkpoint.files.statefile import write_tree
from hf_lifecycle.state.rng.states import RngState, capture_rng, restore_rng, rng_sources
from tests.gpu.device import DEVICE, HAS_CUDA, on_cuda, on_device


def _devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if HAS_CUDA else [DEVICE]


@on_device
def test_generator_of_every_device_draws_again_what_it_drew() -> None:
    drawn = [torch.rand(1, device=device) for device in _devices()]  # and so it is in use
    before = capture_rng()
    drawn = [torch.rand(4, device=device) for device in _devices()]
    restore_rng(before)
    assert all(
        torch.equal(torch.rand(4, device=device), first) for device, first in zip(_devices(), drawn, strict=True)
    )


@on_device
def test_dropout_drops_the_same_after_the_state_went_through_a_file() -> None:
    ones = torch.ones(1000, device=DEVICE)
    torch.nn.functional.dropout(ones)
    state, lacking = RngState.from_state_dict(capture_rng().state_dict())
    dropped = torch.nn.functional.dropout(ones)
    assert not torch.equal(torch.nn.functional.dropout(ones), dropped)
    restore_rng(state)
    assert torch.equal(torch.nn.functional.dropout(ones), dropped)
    assert lacking == ()


@on_cuda
def test_every_device_has_a_source() -> None:
    torch.rand(1, device="cuda")
    assert [name for name in rng_sources() if name.startswith("cuda")] == [str(device) for device in _devices()]


@on_cuda
def test_capture_does_not_wait_for_the_device() -> None:
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    ended = torch.cuda.Event()
    ended.record()
    capture_rng()
    assert not ended.query()


SET_FIRST = """
import sys, torch
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.state.rng.states import RngState, restore_rng
state, _ = RngState.from_state_dict(read_tree(sys.argv[1], kind="test"))
assert not torch.cuda.is_initialized()
restore_rng(state)
print(torch.rand(4, device="cuda").tolist())
"""


@on_cuda
def test_state_that_is_restored_before_the_device_is_used_holds(tmp_path: Path) -> None:
    torch.rand(3, device="cuda")
    write_tree(tmp_path / "rng.safetensors", capture_rng().state_dict(), kind="test")
    drawn = torch.rand(4, device="cuda").tolist()
    command = [sys.executable, "-c", SET_FIRST, str(tmp_path / "rng.safetensors")]
    told = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, capture_output=True
    )
    assert told.returncode == 0, told.stderr.decode()
    assert told.stdout.decode().strip() == str(drawn)


@on_device
@pytest.mark.parametrize("elements", [1, 10_001])
def test_generator_that_a_program_owns_goes_on_by_its_state(elements: int) -> None:
    own = torch.Generator(DEVICE).manual_seed(3)
    torch.rand(elements, generator=own, device=DEVICE)
    state = own.get_state()
    drawn = torch.rand(elements, generator=own, device=DEVICE)
    other = torch.Generator(DEVICE)
    other.set_state(state)
    assert torch.equal(torch.rand(elements, generator=other, device=DEVICE), drawn)
