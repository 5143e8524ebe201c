"""One attempt of a training by as many processes as there are: ``-m tests.distributed.resizing_script FOLDER OUT ARG``.

``ARG`` is a JSON object: training arguments, ``stream`` for streamed data, ``step`` at which to break off, and what the
callback is given. Each rank writes ``OUT/rank-N.json``: what examples each step was of, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from hf_lifecycle import LifecycleCallback, ResumeMismatch, latest_checkpoint
from tests.listening import listening
from tests.trainer.runs import BrokenOff, Rows, Stream, break_off, new_trainer


def attempt(place: Path, out: Path, given: dict[str, Any]) -> None:
    """Train, and tell."""
    rank = int(os.environ.get("RANK", "0"))
    step, stream, callback = given.pop("step", None), given.pop("stream", False), given.pop("callback", {})
    fetched: SimpleQueue[tuple[int, list[float]]] = SimpleQueue()  # what a dict has would be carried over the break
    data = Stream(64) if stream else Rows(40)
    trainer = new_trainer(place, LifecycleCallback(**callback), train=data, **given)
    own = trainer.training_step

    def training_step(model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        fetched.put((trainer.state.global_step, [round(float(one), 5) for one in inputs["x"][:, 0]]))
        return own(model, inputs, *more, **named)

    trainer.training_step = training_step
    told: dict[str, Any] = {}
    with listening() as said:
        try:
            resume = latest_checkpoint(place)
            if step is None:
                trainer.train(resume_from_checkpoint=resume)
            else:
                break_off(trainer, step=step, resume=resume)
        except ResumeMismatch as error:
            told["error"] = str(error)
        except BrokenOff:
            pass
    seen: dict[int, list[float]] = defaultdict(list)
    while not fetched.empty():
        step_of, rows = fetched.get()
        seen[step_of] += rows
    told |= {"seen": seen, "said": [line for line in said if "not exact" in line], "draw": torch.rand(()).item()}
    told["epoch"], told["steps"] = trainer.state.epoch, trainer.state.global_step
    (out / f"rank-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    attempt(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
