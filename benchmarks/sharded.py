"""For how long a save of a sharded model stops training: stock Trainer, torch's async_save and LifecycleCallback.

Each variant trains the same model (a GPT-2 of the size asked for, AdamW, float32) under FSDP2 with SHARDED_STATE_DICT,
or with ``--full`` FULL_STATE_DICT, or with ``--zero STAGE`` under DeepSpeed, if that is installed. Of the last two,
torch has no asynchronous save. Each runs in processes of its own that torchrun starts, in turns, on one file system, on
the CPU with gloo. The first save of a run has a column of its own: it is the callback's template.

- stall: seconds for which the training thread of the slowest rank is held by a save: from the end of a step that saves
  to the begin of the next one, less what lies between two steps otherwise; and in what hooks the next optimizer step.
- whole cost: the seconds of the steps from a save on, half of those until the next one, less those of the other half.

Run: ``python benchmarks/sharded.py [--folder F] [--size GB] [--ranks N] [--rounds N] [--saves N] [--steps N]
[--full | --zero STAGE]`` (the size is that of weights and optimizer state of all ranks; prints the table of
benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

_ZERO = "ZeRO-"
VARIANTS = ("stock", "async_save", "callback")
BYTES_A_PARAMETER = 12  # float32 weights and AdamW's two moments
_WIDTH, _WORDS = 384, 8000


def train(variant: str, folder: Path, settings: argparse.Namespace) -> None:
    """One rank of one run; writes what it has measured to ``folder/rank-N.json``."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from hf_lifecycle import LifecycleCallback
    from hf_lifecycle.saving.snapshots.live import stepping
    from tests.distributed.sharded_cases import admit_engine_on_cpu, admit_on_cpu, zero_config

    if settings.kind.startswith(_ZERO):
        admit_engine_on_cpu()
        # torch's optimizer, which needs nothing to be compiled
        sharding = {"deepspeed": zero_config(int(settings.kind.removeprefix(_ZERO))), "optim": "adamw_torch"}
    else:
        admit_on_cpu()
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": settings.kind}, "use_cpu": True}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = max(1, round((settings.size * 1e9 / BYTES_A_PARAMETER - _WORDS * _WIDTH) / (12 * _WIDTH**2)))
    words = {"vocab_size": _WORDS, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_embd=_WIDTH, n_layer=layers, n_head=6, use_cache=False, **words))
    stalls: list[float] = []
    begins: list[float] = []  # of the steps, from that on which ends in the first save
    marks: dict[str, float] = {}
    ended: list[tuple[float, bool]] = []  # when the step before ended, and whether a save follows
    gaps: list[float] = []  # seconds between steps where nothing is saved: the next batch
    waits: list[bool] = []  # whether a step is to come that waits for what was captured

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            while ended:
                end, is_saved = ended.pop()
                gap = time.perf_counter() - end
                if is_saved:
                    stalls.append(gap - statistics.median(gaps))
                    waits.append(True)
                else:
                    gaps.append(gap)
            if state.global_step >= settings.steps - 1:
                begins.append(time.perf_counter())

    class Before(TrainerCallback):
        """Hooks the optimizer before the callback does, and after it."""

        def __init__(self, mark: str) -> None:
            self.mark = mark

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = stepping(kwargs["optimizer"])
            assert optimizer is not None
            optimizer.register_step_pre_hook(self.note)

        def note(self, *_: Any) -> None:
            marks[self.mark] = time.perf_counter()
            if self.mark == "after" and waits:
                waits.clear()
                stalls[-1] += marks["after"] - marks["before"]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.mark == "after":  # the last callback
                ended.append((time.perf_counter(), control.should_save))

    class Timed(Trainer):
        future: Any = None
        group: Any = None

    class Distributed(Timed):
        """Saves by torch's own asynchronous checkpointing."""

        def _save_checkpoint(self, *given: Any, **named: Any) -> None:
            if self.future is not None:
                self.future.result()
            self.group = self.group or dist.new_group(backend="gloo")
            states = get_state_dict(self.model, self.optimizer)
            state = dict(zip(("model", "optimizer"), states, strict=True))
            place = dcp.FileSystemWriter(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")
            self.future = dcp.async_save(state, storage_writer=place, process_group=self.group)

    class Text(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.arange(settings.tokens) * (index + 1) % _WORDS
            return {"input_ids": ids, "labels": ids}

    ours = [LifecycleCallback()] if variant == "callback" else []
    trainer = (Distributed if variant == "async_save" else Timed)(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / variant),
            **sharding,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=1,
            dataloader_pin_memory=False,
            max_steps=settings.steps * (settings.saves + 2) - 1,  # there it saves once more, which is left out
            save_strategy="steps",
            save_steps=settings.steps,
            logging_strategy="no",
        ),
        train_dataset=Text(),
        callbacks=[Clock(), Before("before"), *ours, Before("after")],
    )
    trainer.train()
    if trainer.future is not None:
        trainer.future.result()
    saves, half = settings.saves, settings.steps // 2
    costs = []
    for number in range(1, saves + 1):
        begin, middle, end = (begins[number * settings.steps + step] for step in (0, half, 2 * half - 1))
        costs.append((middle - begin) - (end - middle) * half / (half - 1))
    found = {"first": stalls[0], "stalls": stalls[1 : saves + 1], "costs": costs, "layers": layers}
    log = folder / variant / "lifecycle.jsonl"
    if log.exists():
        events = [json.loads(line) for line in log.read_text().splitlines()]
        assert sum(event["event"] == "snapshot" for event in events) >= saves, "saves were not made in the background"
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def in_processes(arguments: argparse.Namespace, variant: str, folder: Path) -> list[dict[str, Any]]:
    """Run one variant. Returns what each rank has measured."""
    settings = {name: getattr(arguments, name) for name in ("size", "saves", "steps", "tokens", "kind")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    command += [__file__, "--one", variant, str(folder), json.dumps(settings)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    shutil.rmtree(folder / variant, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{variant} failed:\n{done.stderr[-3000:]}")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(arguments.ranks)]


def row(variant: str, runs: dict[str, list[list[dict[str, Any]]]]) -> str:
    """One row of the table; of each save the slowest rank."""

    def every(of: str, key: str) -> list[float]:
        return [max(each) for run in runs[of] for each in zip(*(rank[key] for rank in run), strict=True)]

    stalls, costs = every(variant, "stalls"), every(variant, "costs")
    stall, cost = statistics.median(stalls), statistics.median(costs)
    of_stall, of_cost = (
        value / statistics.median(every("stock", key)) for value, key in ((stall, "stalls"), (cost, "costs"))
    )
    first = statistics.median(max(rank["first"] for rank in run) for run in runs[variant])
    return (
        f"| {variant} | {first:.2f} s | {stall * 1e3:.0f} ms ({of_stall:.1%}; worst {max(stalls) * 1e3:.0f}) "
        f"| {cost:.2f} s ({of_cost:.0%}) |"
    )


def main() -> None:
    """Measure, and print the table."""
    if sys.argv[1:2] == ["--one"]:
        variant, folder, settings = sys.argv[2:]
        train(variant, Path(folder), argparse.Namespace(**json.loads(settings)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--size", type=float, default=0.3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    kinds = {"dest": "kind", "default": "SHARDED_STATE_DICT"}
    parser.add_argument("--full", action="store_const", const="FULL_STATE_DICT", **kinds)
    parser.add_argument("--zero", metavar="STAGE")
    arguments = parser.parse_args()
    if arguments.zero is not None:
        arguments.kind = _ZERO + arguments.zero
    variants = [one for one in VARIANTS if arguments.kind == kinds["default"] or one != "async_save"]
    runs: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(arguments.rounds):
            for variant in variants:
                runs[variant].append(in_processes(arguments, variant, Path(folder)))
    print("| variant | first save | stall | whole cost |\n|---|---|---|---|")
    for variant in variants:
        print(row(variant, runs), flush=True)


if __name__ == "__main__":
    main()
