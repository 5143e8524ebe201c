"""Nothing is loaded from a checkpoint that does not verify.

Promise: :func:`require_whole` returns only for a checkpoint of which every byte is what its manifest says. One
without a manifest, as stock Trainer saves it, is whole as far as its files tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hf_lifecycle.checkpoint.store import checkpoints_in, tell_skipped
from hf_lifecycle.checkpoint.verification import verify
from hf_lifecycle.errors import DamagedCheckpoint

__all__ = ["require_whole"]


def require_whole(
    checkpoint: Path,
    *,
    only: Sequence[str] = (),
    progress: bool = True,
    also: Callable[[Path], Sequence[str]] = lambda _: (),
) -> None:
    """Return if ``checkpoint`` is whole; one that is not is told to the event log.

    Args:
        checkpoint: The directory. Whoever loads from it says better what is wrong where there is none.
        only: Patterns of the files that are to be loaded; all if there are none.
        progress: Whether there may be a bar.
        also: What else may be wrong with a checkpoint that is whole.

    Raises:
        DamagedCheckpoint: It is not whole, or was moved aside because it is not.
    """
    problems: Sequence[str] = ()
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if checkpoint.is_dir():
        problems = verify(checkpoint, only=only, progress=progress) or also(checkpoint)
    elif aside.is_dir():
        problems = [f"it was moved to {aside.name} at a start, since it is damaged"]
    if problems:
        tell_skipped(checkpoint.parent, None, checkpoint, problems)
        raise DamagedCheckpoint(checkpoint, problems, _newest_beside(checkpoint))


def _newest_beside(checkpoint: Path) -> Path | None:
    others = (path for _, path in checkpoints_in(checkpoint.parent) if path.name != checkpoint.name)
    return next((path for path in others if not verify(path)), None)
