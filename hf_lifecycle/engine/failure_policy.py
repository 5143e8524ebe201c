"""What becomes of a training whose save failed: it ends with the error, or by choice continues without that checkpoint.

Promise: whichever was chosen, the log names the file, the cause and the newest checkpoint there is; the cause once, and
once more in the error that is raised. Gone on from are errors of writing alone; any other error of a save is raised.
Whoever saves has restored what was before.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from hf_lifecycle.checkpoint.directory.store import checkpoints_in
from hf_lifecycle.checkpoint.files.write_errors import annotate, cause_in_words, is_write_fault
from hf_lifecycle.errors import RankFailed
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["FailurePolicy", "OnSaveFailure"]

logger = logging.getLogger("hf_lifecycle")

OnSaveFailure = Literal["raise", "continue"]


def _is_of_writing(error: Exception, ranks: Ranks) -> bool:
    """Whether a save failed in nothing else than writing, on whichever rank; asked on every rank."""
    if not ranks.all_present:  # whoever left does not come to this question either
        return False
    if ranks.world_size == 1:
        return is_write_fault(error)
    is_one_here = isinstance(error, RankFailed) or is_write_fault(error)
    return all(ranks.gather(is_one_here, what="deciding whether training continues after a failed save"))


class FailurePolicy:
    """The failed saves of one training.

    Args:
        choice: ``"raise"`` to end the training, ``"continue"`` to warn and to try again at the next save.
    """

    def __init__(self, choice: OnSaveFailure = "raise") -> None:
        self._choice = choice
        self._last = ""  # of the last save, if it failed

    @property
    def may_go_on(self) -> bool:
        """Whether training continues after a save that failed."""
        return self._choice == "continue"

    @property
    def last_failed(self) -> bool:
        """Whether the last save came to nothing, as far as this rank knows: one in flight has not failed yet."""
        return bool(self._last)

    def is_survived(
        self,
        error: BaseException,
        checkpoint: Path,
        file: str | None,
        ranks: Ranks,
        *,
        is_best: bool = False,
        is_logged: bool = False,
    ) -> bool:
        """Say what failed. Returns whether training continues all the same. Asked on every rank.

        Args:
            checkpoint: What would have been its place.
            file: The file that was being written, where that is known.
            is_logged: Whether the thread that wrote has logged the cause.
        """
        if not isinstance(error, Exception):
            ranks.withdraw(error)
            return False
        goes_on = self.may_go_on and _is_of_writing(error, ranks)
        newest = next((path.name for _, path in checkpoints_in(checkpoint.parent)), "none")
        begin = f"{checkpoint}{' (the best so far)' if is_best else ''}: not saved{f': {file}' if file else ''}"
        end = f"{cause_in_words(error)}; the newest checkpoint is {newest}"
        brief, whole = f"{begin}{end}", f"{begin}: {error}{end}"
        is_others = isinstance(error, RankFailed)  # and in the log of that rank
        if not goes_on:
            if not is_logged and not is_others:
                logger.error("%s", whole)
            annotate(error, brief)
            return False
        self._last = brief
        if ranks.is_main or not is_others:
            logger.warning(
                "%s; training continues, and the next save is tried (on_save_failure='continue')",
                brief if is_logged else whole,
            )
        return True

    def ended(self, checkpoint: Path, *, is_whole: bool) -> None:
        """The last save is on the disk; or it was torn, which the log has been told, and is in no checkpoint."""
        self._last = "" if is_whole else f"{checkpoint}: its tensors changed while they were copied"

    def repeat(self) -> None:
        """At the end of the training: say once more that its end is in no checkpoint."""
        if self._last:
            logger.warning("the last save of this training failed: %s", self._last)
