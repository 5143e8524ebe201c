"""What the ranks of a training tell each other: exchanges, requests to the store and bytes, each step and each save.

Two tables. The first is of real trainings: Trainer with LifecycleCallback and background saves, under data parallelism
and FSDP2, on as many processes as asked for, on the CPU with gloo; what the training thread of rank 0, and of the rank
that asks most beside it, sends to the store of ``torch.distributed`` and gets from it. Requests that only look whether
something is there yet are left out: they depend on how long a rank waits. The second is simulated: as many threads as
ranks make the exchanges of ``processes/ranks.py`` through a store in memory.

Run: ``python benchmarks/exchanges.py [--ranks N ...] [--simulated N ...]`` (prints the tables of benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

STEPS, EVERY = 24, 4  # of a training; a save each so many steps
KINDS = ("DDP", "SHARDED_STATE_DICT", "FULL_STATE_DICT")
_LOOKS = ("check",)


class Counting:
    """A store that counts what the main thread asks of it."""

    def __init__(self, store: Any) -> None:
        self.requests = self.bytes = 0
        self._store = store

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._store, name)
        if not callable(own) or name == "has_extended_api":
            return own

        def method(*given: Any) -> Any:
            result = own(*given)
            is_look = name in _LOOKS or (name == "add" and given[1] == 0)
            if threading.current_thread() is threading.main_thread() and not is_look:
                self.requests += 1
                self.bytes += _size(given) + _size(result)
            return result

        return method


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 8 * isinstance(value, int)


def train(kind: str, folder: Path) -> None:
    """One rank of one training; writes what it has counted to ``folder/rank-N.json``."""
    import torch
    import torch.distributed as dist
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from hf_lifecycle import LifecycleCallback
    from hf_lifecycle.processes.ranks import Ranks
    from tests.distributed.sharded_cases import Tokens, admit_on_cpu, gpt2

    admit_on_cpu()
    torch.set_num_threads(1)
    counted: list[tuple[int, int, int, bool]] = []
    counts: list[int] = []

    class Count(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            store = ranks._store._store
            counted.append((len(counts), store.requests, store.bytes, state.global_step % EVERY == 0))

    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind}} if kind != "DDP" else {}
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        dataloader_pin_memory=False,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=2,
        logging_strategy="no",
        **sharded,
    )
    ranks = Ranks.current()
    inner: Any = ranks._store
    inner._store = Counting(inner._store)
    own = ranks._exchange

    def exchange(*given: Any, **named: Any) -> Any:
        counts.append(1)
        return own(*given, **named)

    ranks._exchange = exchange  # type: ignore[method-assign]
    trainer = Trainer(gpt2(), args, train_dataset=Tokens(), callbacks=[Count(), LifecycleCallback()])
    trainer.train()
    costs = [[now - before for now, before in zip(b[:3], a[:3], strict=True)] for a, b in itertools.pairwise(counted)]
    saves = [cost for cost, (*_, is_save) in zip(costs, counted[1:], strict=True) if is_save][1:]
    # In the step after a save there is one more exchange: whether its snapshot was torn.
    after = [cost for cost, (*_, is_after) in zip(costs, counted, strict=False) if is_after][2:]
    steps = [cost for cost, a, b in zip(costs, counted, counted[1:], strict=False) if not (a[3] or b[3])]
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in (("step", steps), ("save", saves), ("after", after))
    }
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(medians))
    ranks.barrier(what="the end")
    dist.destroy_process_group()


def in_processes(kind: str, ranks: int) -> list[dict[str, list[float]]]:
    """Run one training. Returns what each rank has counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [__file__, "--one", kind, folder]
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            raise RuntimeError(f"{kind} failed:\n{done.stderr[-3000:]}")
        return [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    """Count, and print the tables."""
    if sys.argv[1:2] == ["--one"]:
        train(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--simulated", type=int, nargs="*", default=[8, 64, 1024])
    arguments = parser.parse_args()
    if arguments.ranks:
        print("| training | ranks | a step | a save, with the step after it | requests of rank 0 (another) | bytes |")
        print("|---|---|---|---|---|---|")
    for kind in arguments.kinds if arguments.ranks else ():
        for ranks in arguments.ranks:
            found = in_processes(kind, ranks)
            whole = [[a + b for a, b in zip(one["save"], one["after"], strict=True)] for one in found]
            most = [max(column) for column in zip(*whole[1:], strict=True)]
            step = max(one["step"][0] for one in found)
            print(
                f"| {kind} | {ranks} | {step:.0f} exchanges | {whole[0][0]:.0f} exchanges "
                f"| {whole[0][1]:.0f} ({most[1]:.0f}) | {whole[0][2]:,.0f} ({most[2]:,.0f}) |",
                flush=True,
            )
    if arguments.simulated:
        from tests.many_ranks import EXCHANGES, simulate

        print("\n| exchange | ranks | requests of rank 0 (another) | bytes | rank 0's thread |\n|---|---|---|---|---|")
        for kind in EXCHANGES:
            for ranks in arguments.simulated:
                one = simulate(ranks, kind)
                print(
                    f"| {kind} | {ranks} | {one['requests of rank 0']:.0f} ({one['requests of another']:.0f}) "
                    f"| {one['bytes of rank 0']:,.0f} ({one['bytes of another']:,.0f}) "
                    f"| {one['milliseconds of rank 0']:.1f} ms |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
