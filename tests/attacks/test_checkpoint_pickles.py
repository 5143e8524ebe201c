"""A pickle in a checkpoint runs nothing on a resume: it is refused by name before Trainer would load it.

The manifest is sealed anew each time, as whoever can write the files can do; so what is shown is not its digests.
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lifecycle import DamagedCheckpoint, LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory.pickles import refused_pickles
from hf_lifecycle.processes.preemption import put_back_left_over
from tests.trainer.runs import new_trainer, reseal, saved_run


class Touch:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._proof),)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = saved_run(tmp_path_factory.mktemp("original") / "run")
    put_back_left_over()  # the signals of a training that was broken off
    return checkpoint


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run" / original.name))


REFUSED = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "pytorch_model.bin", "rng_state_0.pth")


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["whole", "inside"])
def test_pickle_that_runs_code_is_refused_before_trainer_loads_it(checkpoint: Path, name: str, place: str) -> None:
    proof = checkpoint.parent / "proof"
    bomb = Touch(proof)
    torch.save(bomb if place == "whole" else {"state": {0: torch.ones(2)}, "more": [bomb]}, checkpoint / name)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    reseal(checkpoint)
    trainer = new_trainer(checkpoint.parent.parent / "other", LifecycleCallback())
    before = trainer.model.layers[0].weight.detach().clone()
    with pytest.raises(DamagedCheckpoint, match=rf"{name}: it names .*mkdir, which could run code"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(trainer.model.layers[0].weight, before)
    assert not proof.exists()


def test_every_pickle_is_named_at_once_and_none_that_trainer_writes(checkpoint: Path) -> None:
    assert refused_pickles(checkpoint) == []
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save(Touch(checkpoint / "proof"), checkpoint / name)
    assert [problem.split(": ")[0] for problem in refused_pickles(checkpoint)] == [
        str(checkpoint / "optimizer.pt"),
        str(checkpoint / "scheduler.pt"),
    ]


def test_plain_pickle_and_old_archive_in_the_place_of_one_are_refused(checkpoint: Path) -> None:
    proof = checkpoint / "proof"
    (checkpoint / "scheduler.pt").write_bytes(pickle.dumps(Touch(proof)))
    torch.save({"x": Touch(proof)}, checkpoint / "optimizer.pt", _use_new_zipfile_serialization=False)
    assert len(refused_pickles(checkpoint)) == 2
    assert not proof.exists()


def test_arguments_are_opened_by_no_one_on_a_resume(checkpoint: Path) -> None:
    proof = checkpoint.parent / "proof"
    torch.save(Touch(proof), checkpoint / "training_args.bin")
    reseal(checkpoint)
    assert latest_checkpoint(checkpoint.parent) == str(checkpoint)
    new_trainer(checkpoint.parent, LifecycleCallback()).train(resume_from_checkpoint=str(checkpoint))
    assert not proof.exists()


def test_looking_at_pickles_reads_no_tensor(checkpoint: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    tensor = torch.zeros(64 << 20, dtype=torch.uint8)
    torch.save({"x": tensor}, checkpoint / "optimizer.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused_pickles(checkpoint) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
