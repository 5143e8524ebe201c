"""Kills a worker at every request that it makes of its disk or its store, and proves that nothing is lost or torn.

Run: ``python -m tests.mirror.kill_worker FOLDER URL EVERY [OPTIONS AS JSON]``. For n = 1, 1 + EVERY and so on, a
forked process copies a checkpoint to a mirror that has one already, keeping one, and kills itself with SIGKILL before
its n-th request, until one is not killed. After each kill, in another process:

- what the output directory has is whole;
- the mirror has at least one copy, and each copy that it lists is whole, every byte of it;
- the next worker copies what is missing, and nothing is left over from the one that was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.checkpoint.directory.retention import KeepLast
from hf_lifecycle.mirror.latest import latest_checkpoint
from hf_lifecycle.mirror.objects import ObjectPlace
from hf_lifecycle.mirror.places import Place
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.mirror.worker import MirrorWorker
from tests.mirror.runs import Told, make
from tests.processes import in_child

DISK = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "link")
STORE = ("pipe_file", "put_file", "rm_file", "rm")


@dataclass(frozen=True)
class Opened(Mirror):
    """A mirror that opens the same place each time, once it is set."""

    place: Place | None = None

    def open(self) -> Place:
        return self.place or super().open()


def carry(out: Path, mirror: Mirror, step: int) -> list[tuple[str, int]]:
    """Copy one checkpoint, and keep one copy."""
    told = Told()
    carrier = MirrorWorker(mirror, out, told, keep=KeepLast(1), pauses=())
    carrier.offer(out / f"checkpoint-{step}")
    carrier.close()
    return told


def die_before_request(number: int, owner: Any, names: tuple[str, ...]) -> None:
    """From now on, the ``number``-th of these requests is not made: the process is killed instead."""
    left = number

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def request(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return request

    for name in names:
        setattr(owner, name, counting(getattr(owner, name)))


def dying(out: Path, mirror: Mirror, number: int) -> None:
    """Copy the second checkpoint, up to the ``number``-th request."""
    place = mirror.open()
    if isinstance(place, ObjectPlace):
        die_before_request(number, place._files, STORE)
        object.__setattr__(mirror, "place", place)
    else:
        die_before_request(number, os, DISK)
    assert ("mirrored", 4) in carry(out, mirror, 4)


def check(out: Path, mirror: Mirror, fetched: Path) -> None:
    """What must hold after a kill, and after the next worker."""
    assert [step for step, _ in store.checkpoints_in(out)] == [4, 2]
    assert [store.problems_of(path, full=True) for _, path in store.checkpoints_in(out)] == [[], []]
    copies = mirror.open().look().copies
    assert copies
    assert all(not copy.problems for copy in copies), copies
    found = latest_checkpoint(fetched, mirror=mirror)
    assert found == str(fetched / f"checkpoint-{copies[0].step}")
    told = carry(out, mirror, 4)
    assert not [each for each in told if each[0] in ("mirror_failed", "skipped")], told
    assert [copy.step for copy in mirror.open().look().copies] == [4], told
    assert list((store.hidden_folder(out) / "mirroring").iterdir()) == []


def kill_at(folder: Path, mirror: Mirror, number: int) -> bool:
    """Copy one, kill the copying of the next, look, and carry on; whether it was killed at all."""
    out = folder / "out"
    for step in (2, 4):
        make(out, step)
    assert in_child(lambda: carry(out, mirror, 2))[0] == 0
    ended, _ = in_child(lambda: dying(out, mirror, number))
    assert ended <= 0
    assert in_child(lambda: check(out, mirror, folder / "fetched"))[0] == 0
    return ended < 0


def main() -> None:
    """Kill at one request after the other; print how often."""
    folder, url, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    options = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    kills = 0
    while kill_at(folder / str(kills), Opened(f"{url}-{kills}", options), 1 + kills * every):
        kills += 1
    print(f"{kills} kills")


if __name__ == "__main__":
    main()
