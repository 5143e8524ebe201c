"""What came of comparing a broken run with the uninterrupted one: a value to print, or the first thing that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_lifecycle.testing.outcome import Outcome, compare

__all__ = ["NotExact", "Report", "Resumed", "check", "counts"]

_ALWAYS = "the clock, os.urandom or another process is read"
# What a run that is not even equal to itself usually does, by the kind of the first difference.
_CAUSES_UNINTERRUPTED = {
    "weights at the start": (
        "the model is created before anything is seeded: call transformers.set_seed(...) first",
        "the seed itself comes from the clock",
    ),
    "RNG states": ("the seed comes from the clock, or is never set", _ALWAYS),
    "batches": (
        "an iterator or a cache at module level keeps its state from run to run: create it where you create the "
        "dataset",
        "a generator is seeded by the clock, or a file that changes is read",
        "shuffling by hash() or by the order of a set: set PYTHONHASHSEED, or sort",
    ),
    "loss": (
        "kernels that are not deterministic: torch.use_deterministic_algorithms(True), on CUDA with "
        "CUBLAS_WORKSPACE_CONFIG=:4096:8",
        "the model draws from its own generator, or keeps state at module level",
    ),
    "weights": (
        "kernels of the backward pass or of the optimizer that are not deterministic: "
        "torch.use_deterministic_algorithms(True)",
    ),
}
# What a run that is equal to itself usually keeps, and does not save.
_CAUSES_BROKEN = {
    "weights at the start": ("the checkpoint does not hold all that is trained",),
    "RNG states": (
        "other code draws random numbers at a moment that an interruption moves: at the start, or while data is loaded",
        "there is no LifecycleCallback, or no manager, in the run",
    ),
    "batches": (
        "the dataset or the collator keeps state that is not found: a counter, a cache, a live generator that is not "
        "one of its attributes; derive it from the index, or give the object state_dict() and load_state_dict()",
        "there is no LifecycleCallback, or no manager, in the run",
    ),
    "loss": (
        "the model, or compute_loss, keeps state outside its tensors (a counter, a schedule): register it as a "
        "buffer, or pass it as objects={...}",
    ),
    "weights": ("the optimizer, a scheduler or a callback keeps state that is not saved: pass it as objects={...}",),
    "train_loss": ("there is no LifecycleCallback in the run",),
    "log": ("a metric is accumulated over the whole run: pass its accumulator as objects={...}",),
}


@dataclass(frozen=True, slots=True)
class Resumed:
    """One run that was interrupted, and ended as the uninterrupted one.

    Attributes:
        broken_at: The steps after which it was interrupted.
        resumed_at: The steps from which it continued.
    """

    broken_at: tuple[int, ...]
    resumed_at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """All broken runs ended with the bits of the uninterrupted one.

    Attributes:
        steps: Optimizer steps of the run.
        resumed: The broken runs.
        compared: How many of each kind were compared in each: batches, weights, optimizer values, log rows, ...
    """

    steps: int
    resumed: tuple[Resumed, ...]
    compared: Mapping[str, int]

    def __str__(self) -> str:
        lines = [f"exact: a run of {self.steps} steps, uninterrupted twice and interrupted {len(self.resumed)} times"]
        for run in self.resumed:
            lines.append(f"  interrupted after step {_steps(run.broken_at)}, resumed at step {_steps(run.resumed_at)}")
        counts = ", ".join(f"{count} {kind}" for kind, count in self.compared.items() if count)
        return "\n".join([*lines, f"  compared bit for bit: {counts}"])


class NotExact(AssertionError):
    """A run did not end as the uninterrupted one.

    Attributes:
        run: Which run: ``"a second uninterrupted run"`` or one that was interrupted.
        kind: What differs first: ``"batches"``, ``"loss"``, ``"weights"``, ...
        since: The step in which it first differs; None where it is seen at the end only.
        problems: Every difference of what the two runs ended with, one sentence each.
        causes: What it usually comes from.
    """

    def __init__(self, run: str, kind: str, since: int | None, problems: Sequence[str], *, deterministic: bool) -> None:
        self.run = run
        self.kind = kind
        self.since = since
        self.problems = tuple(problems)
        known = _CAUSES_BROKEN if deterministic else _CAUSES_UNINTERRUPTED
        self.causes = known.get(kind, ())
        where = "at the end" if since is None else "before the first step" if since == 0 else f"since step {since}"
        lines = [f"{run} differs from the uninterrupted run: {kind} differ{('s' if kind == 'loss' else '')} {where}"]
        lines += [f"  - {problem}" for problem in self.problems]
        if not deterministic:
            lines.append("  The run itself is not deterministic: two uninterrupted runs differ.")
        lines += ["  Usual causes:" if self.causes else ""] + [f"  * {cause}" for cause in self.causes]
        super().__init__("\n".join(line for line in lines if line))


def first_difference(uninterrupted: Outcome, other: Outcome) -> tuple[str, int | None] | None:
    """The kind that differs first, and in which step; None where nothing does.

    Within a step the order is that in which things come about: random numbers, batch, loss, weights.
    """
    for step in sorted(other.trail):
        expected = uninterrupted.trail.get(step)
        if expected is None:
            return "progress", step
        for kind, found in other.trail[step].items():
            # A step that another attempt began and did not finish, or the state that it began with.
            if kind in expected and expected[kind] != found:
                at_start = kind == "weights" and step == other.started_at
                return "weights at the start" if at_start else kind.partition(" of ")[0], step
    problems = compare(uninterrupted, other)
    return (problems[0].partition(":")[0], None) if problems else None


def check(run: str, uninterrupted: Outcome, other: Outcome, *, deterministic: bool) -> None:
    """Raise :class:`NotExact` unless ``other`` is ``uninterrupted``, bit for bit."""
    found = first_difference(uninterrupted, other)
    if found is not None:
        raise NotExact(run, *found, compare(uninterrupted, other), deterministic=deterministic)


def counts(uninterrupted: Outcome) -> dict[str, int]:
    """How many of each kind there are to compare."""
    kinds = {"weights": "weights", "optimizer": "optimizer values", "rng": "RNG states"}
    found = {"batches": len(uninterrupted.batches)}
    found |= {kinds.get(kind, f"{kind} values"): len(leaves) for kind, leaves in uninterrupted.parts.items()}
    return found | {"log rows": len(uninterrupted.log)}


def _steps(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
