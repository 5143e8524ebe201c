"""Which copies a mirror no longer needs, by the policies that output directories go by. Decides, and removes nothing.

Never superfluous: the copy just made, which is verified, the newest, and what the caller protects. A copy that is
damaged counts for nothing and is left to be looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from hf_lifecycle.checkpoint.directory.listing import info_of, older_attempts
from hf_lifecycle.checkpoint.directory.retention import RetentionPolicy, doomed
from hf_lifecycle.mirror.places import Copy

__all__ = ["superfluous"]


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
