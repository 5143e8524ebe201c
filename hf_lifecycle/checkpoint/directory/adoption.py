"""Files that others put under a checkpoint's name before the save: they lie in the checkpoint then.

Such as the mark of transformers' own just-in-time checkpoints. They are not in the manifest, since their owner may
remove them again.
"""

from __future__ import annotations

import os
from pathlib import Path

from hf_lifecycle.checkpoint.directory.manifest import files_below, manifest_if_readable

__all__ = ["adopt_files"]


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
