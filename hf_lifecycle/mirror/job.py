"""A checkpoint on its way to a mirror: hard links to its files, which outlive its removal; and which copies go for it.

Where the disk has no hard links, it is the checkpoint itself, and a copy fails that finds it removed.

Never superfluous is the copy just made, which is verified, the newest, and what the caller protects. A copy that is
damaged counts for nothing and is left to be looked at.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.checkpoint.directory.listing import info_of, older_attempts
from hf_lifecycle.checkpoint.directory.manifest import MANIFEST, Manifest, read_manifest
from hf_lifecycle.checkpoint.directory.retention import RetentionPolicy, doomed
from hf_lifecycle.checkpoint.files.regular import leads_nowhere_else
from hf_lifecycle.errors import MirrorError
from hf_lifecycle.mirror.places import Copy

__all__ = ["MirrorJob", "pack", "superfluous"]


@dataclass(frozen=True, slots=True)
class MirrorJob:
    """What is to be copied.

    Attributes:
        checkpoint: Where it was committed; it may be gone.
        source: Where its files are: links to them, or ``checkpoint``.
        manifest: Which files these are.
        protected: Checkpoints whose copies stay.
    """

    checkpoint: Path
    source: Path
    manifest: Manifest
    protected: tuple[Path, ...] = ()

    @property
    def steps(self) -> frozenset[int]:
        """The steps of what is protected."""
        return frozenset(step for path in self.protected if (step := store.step_of(path)) is not None)

    def protected_in(self, directory: Path, there: Collection[int]) -> list[Path]:
        """What is protected in ``directory``, without the steps that are ``there``."""
        here = [path for path in self.protected if path.parent.resolve() == directory.resolve()]
        return [path for path in here if store.step_of(path) not in there]

    def drop(self) -> None:
        """Let go of the files."""
        if self.source != self.checkpoint:
            store.discard(self.source)


def pack(checkpoint: Path, folder: Path, protected: tuple[Path, ...] = ()) -> MirrorJob:
    """Link the files of ``checkpoint`` in a new folder within ``folder``.

    Raises:
        FileNotFoundError: It has no manifest.
        StateFileError: Its manifest is damaged.
        MirrorError: One of its files is a link that leads out of it.
    """
    manifest = read_manifest(checkpoint)
    links = folder / f"{checkpoint.name}.{secrets.token_hex(4)}"
    try:
        for name in [*(entry.path for entry in manifest.files), str(MANIFEST)]:
            if not leads_nowhere_else(checkpoint, checkpoint / name):
                raise MirrorError(checkpoint / name, "a symbolic link to outside the checkpoint")
            (links / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(checkpoint / name, links / name)
    except OSError:  # a disk without hard links
        store.discard(links)
        links = checkpoint
    return MirrorJob(checkpoint, links, manifest, protected)


def superfluous(
    newest: Copy, others: Sequence[Copy], keep: RetentionPolicy | None, protected: Collection[int]
) -> list[tuple[Copy, str]]:
    """The copies of ``others`` (newest first) to be removed, each with the reason; without ``keep``, replaced ones."""
    current, found = {newest.step: newest}, []
    for copy in others:
        if copy.step in current and not copy.problems:
            found.append((copy, "replaced by a newer one of the same step"))
        elif not copy.problems:
            current[copy.step] = copy
    if keep is not None:
        older = older_attempts(None, (copy.manifest for copy in current.values()))
        of_this_run = [copy for copy in current.values() if copy.manifest.attempt not in older]
        infos = {info_of(Path(copy.name), copy.manifest): copy for copy in of_this_run}
        safe = [info.path for info, copy in infos.items() if copy is newest or copy.step in protected]
        found += [(infos[info], f"not kept by {keep!r}") for info in doomed(infos, keep, safe)]
    return found
