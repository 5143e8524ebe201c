"""For how long a save stops training, and what it costs: stock Trainer, torch's async_save and LifecycleCallback.

Each variant trains the same model (a GPT-2 of the size asked for, AdamW, float32) in a process of its own, in turns, on
one file system, on a CPU or on an accelerator (``--device cuda``). The first save of a run has a row of its own, and is
left out of every other figure: it is the callback's template, and the first one of any kind pays for memory and files
that later ones find. Beside them a plain sequential O_DIRECT write of as many bytes.

- stall: seconds for which the training thread is held by a save: from the end of a step that saves to the begin of the
  next one, less what lies between two steps otherwise; and in what hooks the next optimizer step.
- whole cost: the seconds of the steps from a save on, half of those until the next one, less those of the other half,
  which nothing disturbs: as many, of the same run, right after them. A machine's speed drifts from run to run, and its
  steps scatter, by more than a save costs; the median of all saves is taken. What is written while training continues
  has to be done within its half, or the run is refused. What stock Trainer leaves to the page cache may be written at
  any time.
- disk: bytes a second while a save's files are written, against the plain write.
- memory: the most that the process had, less that of stock Trainer's.

On an accelerator, training's stream is waited for before the clock is read, so that no computing that was asked for
before counts as a stall, and all that a save asks for on that stream does. Steps take milliseconds there, and a write
takes seconds: before the next save the one before is waited for, beside the clock (``--settle``), and the whole cost is
given only of saves that were written within half of the steps to the next one.

Run: ``python benchmarks/stall.py [--folder F] [--sizes 0.1 1.5 4] [--rounds N] [--saves N] [--steps N] [--device D]
[--json FILE]`` (sizes: GB of weights and optimizer state; prints the table of benchmarks/README.md, each row as soon as
it is known; the file has the figures of every process that ended).
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

VARIANTS = ("stock", "callback", "async_save")
BYTES_A_PARAMETER = 12  # float32 weights and AdamW's two moments
BLOCK = 16 << 20
LONGEST_WRITE = 300.0  # seconds for which a save that is being written is waited for
LARGEST_PLAIN = 2 << 30  # bytes of the plain write


def shape(gigabytes: float) -> dict[str, int]:
    """A GPT-2 with about so many bytes of weights and optimizer state; 1.5 is GPT-2 small, 124 M parameters."""
    target = gigabytes * 1e9 / BYTES_A_PARAMETER
    width = 768 if gigabytes > 1 else 256
    outside = (50257 if gigabytes > 1 else 8000) * width + 1024 * width
    layers = max(1, round((target - outside) / (12 * width * width)))
    return {"n_embd": width, "n_layer": layers, "n_head": width // 64, "vocab_size": 50257 if gigabytes > 1 else 8000}


def train(variant: str, size: float, folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """One run: ``settings.saves`` saves after the first, ``settings.steps`` apart."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from hf_lifecycle import LifecycleCallback

    saves, steps, tokens, device = settings.saves, settings.steps, settings.tokens, settings.device
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT2LMHeadModel(GPT2Config(**shape(size), use_cache=False))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    first: list[float] = []  # seconds that the first save held training
    stalls: list[float] = []
    begins: list[float] = []  # of the steps, from that on which ends in the second save, and the end of the last
    ends: list[float] = []  # of saves that continue beside training

    def wait_for_device() -> None:
        if device == "cuda":
            torch.cuda.current_stream().synchronize()

    def wait_for_write(step: int) -> None:
        place, end = folder / variant / f"checkpoint-{step}", time.monotonic() + LONGEST_WRITE
        if variant == "async_save":
            trainer.future.result(timeout=LONGEST_WRITE)
        while not place.exists():
            if time.monotonic() > end:
                raise RuntimeError(f"{place.name} was not written within {LONGEST_WRITE:.0f} s")
            time.sleep(0.01)

    class Clock(TrainerCallback):
        """Notes when steps begin, from the second save on, and ends the run."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            note_gap(state.global_step)
            if settings.settle and state.global_step >= steps and (state.global_step + 1) % steps == 0:
                wait_for_write(state.global_step + 1 - steps)
            if (state.global_step + 1) % (steps // 2) == 0:
                wait_for_device()
            if state.global_step >= 2 * steps - 1:
                begins.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == steps * (saves + 2) - 1:
                wait_for_device()
                begins.append(time.perf_counter())
                control.should_training_stop = True

    class Before(TrainerCallback):
        """Hooks the optimizer before the callback does, and after it."""

        def __init__(self, mark: str) -> None:
            self.mark = mark

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            inner = getattr(optimizer, "optimizer", optimizer)
            inner.register_step_pre_hook(self.note)

        def note(self, *_: Any) -> None:
            if self.mark == "before" and pending:
                wait_for_device()
            marks[self.mark] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.mark == "after":  # the last callback
                if control.should_save:
                    wait_for_device()
                ended.append((time.perf_counter(), control.should_save))

    marks: dict[str, float] = {}
    ended: list[tuple[float, bool]] = []  # when the step before ended, and whether a save follows
    gaps: list[float] = []  # seconds between steps where nothing is saved: the next batch

    def note_gap(step: int) -> None:
        while ended:
            end, is_saved = ended.pop()
            if is_saved:
                wait_for_device()
            gap = time.perf_counter() - end
            if is_saved:
                (stalls if step > steps else first).append(gap - statistics.median(gaps))
            else:
                gaps.append(gap)

    class Timed(Trainer):
        def training_step(self, *given: Any, **named: Any) -> Any:
            if stalls and "after" in marks and self.state.global_step > steps + 1 and pending:
                stalls[-1] += marks["after"] - marks["before"]
                pending.clear()
            if stalls and not pending and self.state.global_step % steps == 0:
                pending.append(True)
            return super().training_step(*given, **named)

    pending: list[bool] = []

    class Distributed(Timed):
        """Saves by torch's own asynchronous checkpointing."""

        future: Any = None

        def _save_checkpoint(self, *given: Any, **named: Any) -> None:
            import torch.distributed.checkpoint as dcp

            if self.future is not None:
                self.future.result()
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.optimizer.state_dict()}
            place = str(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")
            self.future = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(place))
            self.future.add_done_callback(lambda _: ends.append(time.perf_counter()))

    class Text(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.arange(tokens) * (index + 1) % 8000
            return {"input_ids": ids, "labels": ids}

    callbacks: list[Any] = [Clock(), Before("before")]
    if variant == "callback":
        callbacks.append(LifecycleCallback())
    callbacks.append(Before("after"))
    if variant == "async_save":
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    trainer = (Distributed if variant == "async_save" else Timed)(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / variant),
            use_cpu=device == "cpu",
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=settings.batch,
            dataloader_pin_memory=device != "cpu",
            max_steps=steps * (saves + 3),  # left before that: at the last step, Trainer saves once more
            save_strategy="steps",
            save_steps=steps,
            save_total_limit=2 if variant in ("stock", "callback") else None,
            logging_strategy="no",
        ),
        train_dataset=Text(),
        callbacks=callbacks,
    )
    trainer.train()
    if variant == "async_save":
        trainer.future.result()
    rates = []
    log = folder / variant / "lifecycle.jsonl"
    if log.exists():
        events = [json.loads(line) for line in log.read_text().splitlines()]
        rates = [event["mb_per_second"] for event in events if event["event"] == "written"]
        committed = [event["time"] for event in events if event["event"] == "committed"]
        assert len(committed) == saves + 1, "a save is missing"
        clock = time.time() - time.perf_counter()
        ends = [datetime.fromisoformat(moment).timestamp() - clock for moment in committed]
    if variant == "async_save":
        torch.distributed.destroy_process_group()
    return {
        "first": first[0],
        "stalls": stalls,
        "costs": costs(begins, steps, ends[1:], some=settings.settle),
        "rates": rates,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_memory": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "bytes": parameters * BYTES_A_PARAMETER,
    }


def costs(begins: list[float], steps: int, ends: list[float], *, some: bool = False) -> list[float]:
    """What each save cost in all, in seconds.

    Args:
        begins: When the steps began, from that on which ends in a save, and when the last one ended.
        steps: From save to save, an even number.
        ends: When the saves were done that continued beside training.
        some: Leave out those that took longer than half of the steps, instead of refusing the run.
    """
    found = []
    for first in range(0, len(begins) - 1, steps):
        begin, middle, end = begins[first], begins[first + steps // 2], begins[first + steps]
        if any(middle < one < end for one in ends):
            if some:
                continue
            raise RuntimeError(f"a save took more than {steps // 2} steps: give more --steps")
        found.append((middle - begin) - (end - middle))
    return found


def plain_write(folder: Path, size: int) -> float:
    """MB/s of a sequential O_DIRECT write of ``size`` bytes, flushed."""
    noise = mmap.mmap(-1, BLOCK)
    noise[:] = os.urandom(BLOCK)
    path = folder / "plain"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except OSError:  # a file system without direct writes
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    began = time.perf_counter()
    for _ in range(max(1, size // BLOCK)):
        os.write(descriptor, noise)
    os.fsync(descriptor)
    seconds = time.perf_counter() - began
    os.close(descriptor)
    path.unlink()
    return max(1, size // BLOCK) * BLOCK / seconds / 1e6


def in_process(arguments: argparse.Namespace, variant: str, size: float, folder: Path) -> dict[str, Any]:
    """Run one variant in a process of its own."""
    shutil.rmtree(folder / variant, ignore_errors=True)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    if arguments.fork:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
            return pool.submit(train, variant, size, folder, argparse.Namespace(**settings)).result()
    command = [sys.executable, __file__, "--one", variant, str(size), str(folder), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(folder / variant, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{variant} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def row(variant: str, size: float, runs: dict[str, list[dict[str, Any]]], plain: list[float]) -> str:
    """One row of the table."""

    def middle(of: str, key: str) -> float | None:
        found = [one for run in runs[of] for one in (run[key] if isinstance(run[key], list) else [run[key]])]
        return statistics.median(found) if found else None

    def part(value: float | None, whole: float | None, digits: int = 0) -> str:
        return "" if value is None or not whole else f"{value / whole:.{digits}%}"

    worst = max(stall for run in runs[variant] for stall in run["stalls"])
    stall, cost, rate, memory = (middle(variant, key) for key in ("stalls", "costs", "rates", "memory"))
    assert stall is not None
    assert memory is not None
    paid = "not known" if cost is None else f"{cost:.2f} s ({part(cost, middle('stock', 'costs'))})"
    disk = "" if rate is None else f"{rate:.0f} of {statistics.median(plain):.0f} MB/s"
    disk += "" if rate is None else f" ({part(rate, statistics.median(plain))})"
    more = (memory - (middle("stock", "memory") or 0.0)) / 1e9
    return (
        f"| {size:g} GB | {variant} | {stall * 1e3:.1f} ms ({part(stall, middle('stock', 'stalls'), 1)}; "
        f"worst {worst * 1e3:.0f}) | {paid} | {disk} | {more:+.2f} GB |"
    )


def first_row(variant: str, size: float, runs: dict[str, list[dict[str, Any]]]) -> str:
    """For how long the first save of a run holds training, a row of the same table."""
    own, stock = (statistics.median(run["first"] for run in runs[one]) for one in (variant, "stock"))
    return f"| {size:g} GB | {variant}, first save | {own:.2f} s ({own / stock:.0%}) |  |  |  |"


def measure(arguments: argparse.Namespace, size: float, folder: Path, known: list[dict[str, Any]]) -> None:
    """Run and print the rows of one size."""
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    plain = []
    for number in range(arguments.rounds):
        plain.append(plain_write(folder, min(int(size * 1e9), LARGEST_PLAIN)))
        for variant in VARIANTS:
            began = time.monotonic()
            runs[variant].append(in_process(arguments, variant, size, folder))
            facts = {"size": size, "variant": variant, "plain": plain[-1], "seconds": time.monotonic() - began}
            known.append({**facts, **runs[variant][-1]})
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(known, indent=1))
            if number == arguments.rounds - 1:
                print(first_row(variant, size, runs), row(variant, size, runs, plain), sep="\n", flush=True)


SETTINGS = ("saves", "steps", "tokens", "batch", "threads", "device", "settle")


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        variant, size, folder, settings = sys.argv[2:]
        print(json.dumps(train(variant, float(size), Path(folder), argparse.Namespace(**json.loads(settings)))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; it decides which disk is measured")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 1.5, 4])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--saves", type=int, default=6, help="saves after the first")
    parser.add_argument("--steps", type=int, default=8, help="from save to save, an even number")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch, for training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--settle", action="store_true", help="wait for a write before the next save; on cuda always")
    parser.add_argument("--fork", action="store_true", help="import once, and fork; for a try, not for figures")
    parser.add_argument("--json", type=Path, help="where the figures go, after every process")
    arguments = parser.parse_args()
    arguments.settle |= arguments.device == "cuda"
    if arguments.fork:
        import transformers.trainer  # noqa: F401
    if arguments.steps < 2 or arguments.steps % 2:
        parser.error(f"--steps {arguments.steps}: give an even number, half of them beside a save and half without")
    print(
        "| state | saved by | stall per save (of stock's; worst) | whole cost per save (of stock's) | disk | memory |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    known: list[dict[str, Any]] = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measure(arguments, size, Path(folder), known)


if __name__ == "__main__":
    main()
