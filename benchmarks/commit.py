"""What a commit (flush, digest, manifest, rename) adds to writing the same files with fsync; how fast verifying reads.

Everything is measured in one process and in turns, on one file system, since disks are shared and their speed drifts:
each round writes the files and flushes them; writes them and commits them; reads them; verifies them in full. Before
each reading the files are dropped from the page cache, as after a restart. The medians over all rounds count.

Run: ``python benchmarks/commit.py [--folder F] [--sizes 0.1 0.5 1] [--rounds N]`` (prints the table of
benchmarks/README.md; sizes in GB).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hf_lifecycle.checkpoint.directory.manifest import Manifest
from hf_lifecycle.checkpoint.directory.store import commit, problems_of, staging_folder

BLOCK = 4 << 20
SHARES = {"model.safetensors": 1 / 3, "optimizer.pt": 2 / 3}  # as Adam has it: two moments for each weight
SMALL = ("config.json", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin")


def write(folder: Path, total: int, noise: bytes) -> None:
    """The files of a checkpoint, not flushed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, share in SHARES.items():
        with open(folder / name, "wb", buffering=0) as file:
            left = int(total * share)
            while left > 0:
                left -= file.write(noise[: min(left, BLOCK)])
    for name in SMALL:
        (folder / name).write_bytes(noise[:4000])


def flush(folder: Path) -> None:
    """Flush each file, then the directory: what durable writing costs without us."""
    for path in (*sorted(folder.iterdir()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(folder: Path) -> None:
    """Drop a directory's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read(folder: Path) -> None:
    """Read every file in the blocks that verification reads."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(BLOCK):
                    pass


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(folder: Path, total: int, rounds: int) -> dict[str, float]:
    """Medians in seconds."""
    noise, plain, final = os.urandom(BLOCK), folder / "plain", folder / "checkpoint-1"
    staged = staging_folder(folder) / final.name
    times: dict[str, list[float]] = {"flush": [], "commit": [], "read": [], "verify": []}

    def plainly() -> None:
        write(plain, total, noise)
        flush(plain)

    def committed() -> None:
        write(staged, total, noise)
        commit(staged, final, lambda files: Manifest("", 1, 1.0, 1, "", None, files))

    for number in range(rounds):
        turns = [("flush", plainly), ("commit", committed)]
        for name, work in turns if number % 2 else turns[::-1]:
            shutil.rmtree(plain, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            os.sync()
            times[name].append(seconds(work))
        if not final.exists():
            committed()

        def verified() -> None:
            assert problems_of(final, full=True) == []

        turns = [("read", lambda: read(final)), ("verify", verified)]
        for name, work in turns if number % 2 else turns[::-1]:
            forget(final)
            times[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder if not given")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print("| size | write + fsync | write + commit | added | read | verify | of read's speed |")
    print("|---|---|---|---|---|---|---|")
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(Path(folder), int(size * 1e9), options.rounds)
        print(
            f"| {size:g} GB | {found['flush']:.2f} s | {found['commit']:.2f} s "
            f"| {found['commit'] / found['flush'] - 1:+.0%} "
            f"| {size / found['read']:.2f} GB/s | {size / found['verify']:.2f} GB/s "
            f"| {found['read'] / found['verify']:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
