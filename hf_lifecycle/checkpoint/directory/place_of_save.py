"""Where a checkpoint is about to be saved: whether there is room for it, and what others put there before.

Room is judged by what the last checkpoint took. Not promised: that a save which begins also ends. Others fill the same
disk, and a checkpoint may grow; a save that meets a full disk all the same fails and leaves what was there.

Files that others put under a checkpoint's name before the save, such as the mark of transformers' own just-in-time
checkpoints, lie in the checkpoint then. They are not in the manifest, since their owner may remove them again.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from hf_lifecycle.checkpoint.directory.manifest import files_below, manifest_if_readable
from hf_lifecycle.errors import NotEnoughSpace

__all__ = ["adopt_files", "require_space", "size_of"]

_REST = 64 << 10  # bytes that a disk may have left on which a file could not be written to its end


def size_of(checkpoint: Path) -> int:
    """Bytes that the regular files of a checkpoint take, in whole blocks of the disk; 0 where there is none."""
    if not checkpoint.is_dir():
        return 0
    found = (os.lstat(f"{folder}/{name}") for folder, _, names in os.walk(checkpoint) for name in names)
    return sum(
        max(status.st_size, 512 * getattr(status, "st_blocks", 0)) for status in found if stat.S_ISREG(status.st_mode)
    )


def require_space(directory: Path, needed: int | None, unfinished: Path | None = None) -> None:
    """Look for room for a checkpoint of ``needed`` bytes; of the first one, see whether it has filled the disk.

    Args:
        needed: What the checkpoint before it takes, if there is one.
        unfinished: What there is of it already, which is removed next; its bytes count as free.

    Raises:
        NotEnoughSpace: The file system of ``directory`` has less than that free for this user.
    """
    try:
        disk = shutil.disk_usage(directory)
        written = size_of(unfinished) if unfinished is not None else 0
        free = disk.free + written
    except OSError:  # the save itself will say what is wrong
        return
    # A file system that does not count its space says that it has none at all.
    lacks = written > 0 and disk.free < _REST if needed is None else free < needed
    if disk.total > 0 and lacks:
        raise NotEnoughSpace(directory, needed, free)


def adopt_files(final: Path, staged: Path) -> frozenset[str]:
    """Move what others wrote into ``final``, which holds no checkpoint or an older one, into ``staged``.

    What the complete checkpoint in ``staged`` has itself is not replaced. Returns the paths, relative to it.
    """
    if not final.is_dir() or final.is_symlink():
        return frozenset()
    manifest = manifest_if_readable(final)
    of_before = set() if manifest is None else {entry.path for entry in manifest.files}
    adopted = set()
    for path in list(files_below(final)):
        name = path.relative_to(final).as_posix()
        target = staged / name
        if name in of_before or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        adopted.add(name)
    return frozenset(adopted)
