"""A rank that is stopped, or whose main thread hangs: ``-m tests.distributed.silent_script FOLDER PLACE``.

Trains in ``FOLDER/run``; rank 1 stops itself (SIGSTOP) in step 4, in the save of step 4 or at a resume, or waits in
step 4 for ever; with any other ``PLACE`` it does nothing of the kind.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging as host_logging

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from tests.trainer.runs import Rows, digests, new_trainer

# Imported by whoever collects doctests, it has no arguments and no rank.
FOLDER, PLACE = (Path(sys.argv[1]), sys.argv[2]) if __name__ == "__main__" else (Path(), "")
RANK = int(os.environ.get("RANK", "0"))


class Stops(Trainer):
    def _meet(self, place: str) -> None:
        if RANK == 1 and place == PLACE:
            (FOLDER / "met").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            self._meet("step")
            if RANK == 1 and PLACE == "wait":
                self.wait_for_what_never_comes()
        return super().training_step(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 4:
            self._meet("save")
        super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._meet("resume")
        super()._load_from_checkpoint(*args, **kwargs)

    def wait_for_what_never_comes(self) -> None:
        (FOLDER / "met").touch()
        threading.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    host_logging.set_verbosity_error()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    trainer = new_trainer(FOLDER / "run", LifecycleCallback(), kind=Stops, train=Rows(32))
    trainer.train(resume_from_checkpoint=latest_checkpoint(FOLDER / "run"))
    (FOLDER / f"rank-{RANK}.json").write_text(json.dumps(digests(trainer)))
