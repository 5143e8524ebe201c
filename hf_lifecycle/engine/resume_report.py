"""What a resume finds: whether the run may continue with it, what the log says, and the receipt; for every host.

Promise: a run continues only when its state is the one that was saved, or a warning has said what is not. A message has
at most ten lines.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.admission import way_to_another
from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.checkpoint.directory.verification import recall
from hf_lifecycle.checkpoint.inspection.acceptance import said_of_accepted
from hf_lifecycle.checkpoint.inspection.receipt import FORMAT, write_receipt
from hf_lifecycle.errors import ResumeMismatch, StateFileError, StateMismatch
from hf_lifecycle.messages import few, shortened
from hf_lifecycle.state.environment import Difference, Grade, capture_versions
from hf_lifecycle.state.proof import Proof

__all__ = ["ResumeReport", "reading_unverified", "saved_by_version"]

logger = logging.getLogger("hf_lifecycle")

_PACKAGE = "hf-lifecycle"
_UNVERIFIED = "it has no lifecycle/manifest.json, so no file was verified before it was loaded, and any may be damaged"
_STATE = "trainer_state.json"


class ResumeReport:
    """The findings of one resume.

    Args:
        checkpoint: What is resumed from; None in a fresh run.
        strict: Whether what breaks exactness is an error.
        advice: What a user can do about it.

    Attributes:
        problems: Why the run does not continue exactly, in words. A host may add to them.
        doubts: Why it may not, in words. They are the host's.
    """

    def __init__(self, checkpoint: Path | None, *, strict: bool, advice: str) -> None:
        self.differences: list[Difference] = []
        self.problems: list[str] = [] if checkpoint is None else said_of_accepted(checkpoint)
        self.doubts: list[str] = []
        self._checkpoint = checkpoint
        self._strict = strict
        self._advice = advice
        self._logged = {"not exact": 0, "maybe not exact": 0}

    def require(self, problems: Sequence[str], differences: Sequence[Difference] = (), *, only_told: str = "") -> None:
        """Go on with what was found, or raise.

        Args:
            only_told: Why the differences are no error, in words; empty where they are.

        Raises:
            ResumeMismatch: What breaks exactness, unless that is admitted; what is fatal in any case.
        """
        unlike = [str(one) for one in differences if not one.is_harmless]
        is_fatal = any(one.grade is Grade.FATAL for one in differences)
        is_told = bool(unlike and only_told) and not is_fatal
        breaking = [*problems, *([] if is_told else unlike)]
        if breaking and (is_fatal or self._strict):
            raise self._refusal(breaking, "" if is_fatal else self._advice)
        self.differences += differences
        self.problems += [*breaking, *([f"{only_told}: {few(unlike, '; ')}"] if is_told else [])]

    def _refusal(self, problems: Sequence[str], advice: str) -> ResumeMismatch:
        checkpoint = self._checkpoint
        if checkpoint is None or manifest_path(checkpoint).is_file():
            return ResumeMismatch(checkpoint, problems, advice)
        moves = [move for move in (way_to_another(checkpoint), advice) if move]
        return ResumeMismatch(checkpoint, [_UNVERIFIED, *problems], "; or ".join(moves))

    def _warn_if_unverified(self, checkpoint: Path) -> None:
        """Say so where it has no manifest. What a loop saved with ``save_state`` alone never has one."""
        if manifest_path(checkpoint).is_file():
            return
        another = way_to_another(checkpoint)
        if another or (checkpoint / _STATE).is_file():
            logger.warning(
                "%s: %s; what was compared after loading is as it was saved; %s",
                checkpoint,
                _UNVERIFIED,
                f"to be sure of the rest, {another}" if another else "no other checkpoint there verifies",
            )

    def warn(self) -> None:
        """Log the problems and doubts that are not in the log yet."""
        for grade, found in (("not exact", self.problems), ("maybe not exact", self.doubts)):
            for one in shortened(found[self._logged[grade] :]):
                logger.warning("%s: %s", grade, one)
            self._logged[grade] = len(found)

    def finish(
        self,
        place: str,
        identity: Mapping[str, Any],
        *,
        attempt: str,
        restored: Sequence[str],
        proof: Proof,
        seconds: float,
        directory: Path | None,
    ) -> None:
        """Log what came of the resume, and write its receipt.

        Args:
            place: Where the run continues, in words.
            identity: Of the state in the checkpoint.
            seconds: What restoring and proving took.
            directory: The output directory; None where no receipt is written, as on other ranks than the first.
        """
        checkpoint, written = self._checkpoint, None
        assert checkpoint is not None
        verified = recall(checkpoint)
        if directory is not None:
            self._warn_if_unverified(checkpoint)
            is_inside = checkpoint.parent.resolve() == directory.resolve()
            receipt = {
                "format": FORMAT,
                "exact": not (self.problems or self.doubts),
                "attempt": attempt,
                "checkpoint": checkpoint.name if is_inside else str(checkpoint),
                "saved_by": str(identity["attempt"]),
                "step": int(identity["step"]),
                "verified": None if verified is None else asdict(verified),
                "restored": list(restored),
                "proved": {kind: count for kind, count in proof.items() if kind != "repaired"},
                "repaired": list(proof.names),
                "differences": [{"grade": str(one.grade), "what": str(one)} for one in self.differences],
                "why_not_exact": [*self.problems, *(f"maybe: {one}" for one in self.doubts)],
                "seconds": round(seconds, 6),
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            written = write_receipt(directory, receipt)
        logger.info(
            "resumed from %s at %s; %s; verified %s; compared after loading: %s; differences: %s; receipt: %s",
            checkpoint,
            place,
            f"{'not' if self.problems else 'maybe not'} exact, see the warnings"
            if self.problems or self.doubts
            else "exact",
            verified or "no file in advance",
            proof,
            "; ".join(shortened([str(one) for one in self.differences])) or "none",
            written or "written by rank 0 only",
        )


@contextmanager
def reading_unverified(checkpoint: Path) -> Iterator[None]:
    """Around what reads this package's own files: of one that no manifest has verified, an error says what to do.

    Raises:
        ResumeMismatch: A file cannot be read, and there is no manifest.
    """
    try:
        yield
    except StateFileError as error:
        if manifest_path(checkpoint).is_file():
            raise
        raise ResumeMismatch(checkpoint, [_UNVERIFIED, str(error)], way_to_another(checkpoint)) from error


@contextmanager
def saved_by_version(checkpoint: Path, environment: Mapping[str, Any]) -> Iterator[None]:
    """Around what reads this package's own state: if another version saved it, an error says that, and what to do.

    Args:
        environment: That of the run that saved it.

    Raises:
        ResumeMismatch: The state lacks a key that this version needs, or has one that it does not know.
    """
    try:
        yield
    except (StateMismatch, KeyError) as error:
        saved, here = (versions.get(_PACKAGE) for versions in (environment, capture_versions()))
        if saved == here:
            raise
        raise ResumeMismatch(
            checkpoint,
            [f"{_PACKAGE} {saved} saved it; version {here} cannot read its state ({type(error).__name__}: {error})"],
            f"install {_PACKAGE} {saved} to resume this run, and upgrade when it is done",
        ) from error
