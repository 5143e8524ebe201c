"""What differs between two checkpoints, bit for bit and grouped, causes first.

Promise: nothing in either can run code (:mod:`hf_lifecycle.cli.differences` reads torch's files), and no file is left
out but ``training_args.bin``, which is a pickle of a class; where there is a state file, the arguments that decide
about bits are compared from there. Identity, time of saving and clock readings are no differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.files.additions import KINDS, without_mark
from hf_lifecycle.checkpoint.files.regular import digest_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.checkpoint.inspection.description import read_trainer_state
from hf_lifecycle.cli.differences import (
    REGISTERED,
    RNG,
    differing_leaves,
    load_torch,
    names_in,
    plain_files,
    tensors_of,
    torch_files,
)
from hf_lifecycle.cli.leaves import RefusedStateError, leaves
from hf_lifecycle.errors import StateFileError

__all__ = ["diff"]

_CLOCK_FIELDS = ("_runtime", "_per_second")
_CLOCKS = ("seconds", "elapsed_seconds")
# Where a run is, and who it is: the same run elsewhere is the same run.
_NOT_STATE = ("log_history", "best_model_checkpoint", "stateful_callbacks")

Trees = tuple[Mapping[str, Any], Mapping[str, Any]]


class Findings:
    """The differences found so far, by group, in the order in which groups were first named."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Any]] = {}
        self.not_compared: list[str] = []

    def add(self, group: str, compared: int, found: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]) -> None:
        """Add ``compared`` values of ``group`` and those among them that differ."""
        entry = self._groups.setdefault(group, {"name": group, "compared": 0, "differences": []})
        entry["compared"] += compared
        entry["differences"] += [{"group": group, "where": where, "what": what} for where, what in found]

    def add_trees(self, group: str, one: Any, other: Any, prefix: str = "") -> None:
        """Compare two trees leaf by leaf."""
        first, second = leaves(one), leaves(other)
        named = ((prefix + path, what) for path, what in differing_leaves(first, second))
        self.add(group, len(first.keys() | second.keys()), named)

    def report(self, a: Path, b: Path) -> dict[str, Any]:
        """All of it as plain data."""
        groups = list(self._groups.values())
        first = next((found for group in groups for found in group["differences"]), None)
        return {
            "a": str(a),
            "b": str(b),
            "identical": first is None,
            "first": first,
            "groups": groups,
            "not_compared": self.not_compared,
        }


def diff(a: Path, b: Path) -> dict[str, Any]:
    """Compare two checkpoints.

    Raises:
        ValueError: One is a checkpoint of Trainer's and the other one of a loop's.
        StateFileError: A file is damaged, hostile, or not what its name says.
        OSError: A file cannot be read.
    """
    by_trainer = [path for path in (a, b) if (path / "trainer_state.json").exists()]
    if len(by_trainer) == 1:
        loop = b if by_trainer == [a] else a
        raise ValueError(
            f"{by_trainer[0]} was saved by Trainer and {loop} by a custom training loop; give two checkpoints of the "
            "same kind"
        )
    try:
        return _diff(a, b)
    except RefusedStateError as error:
        raise StateFileError(f"{a} or {b}", str(error)) from error


def _diff(a: Path, b: Path) -> dict[str, Any]:
    findings = Findings()
    states = _rank_files(a), _rank_files(b)
    trees = [
        (name, (read_tree(states[0][name], kind=KINDS), read_tree(states[1][name], kind=KINDS)))
        for name in sorted(states[0].keys() & states[1].keys())
    ]
    for name, pair in trees:
        prefix = f"{name}: " if len(trees) > 1 else ""
        for group in ("arguments", "environment", "data"):
            findings.add_trees(group, _part(pair[0], group), _part(pair[1], group), prefix)
    _compare_trainer_states(a, b, findings)
    _compare_weights(a, b, findings)
    _compare_torch_files(a, b, findings, trees)
    for name, pair in trees:
        _compare_parts(pair, findings, f"{name}: " if len(trees) > 1 else "")
    _note_state_files(states, findings)
    _compare_other_files(a, b, findings)
    return findings.report(a, b)


def _rank_files(checkpoint: Path) -> dict[str, Path]:
    return {path.stem: path for path in (checkpoint / "lifecycle").glob("rank-*.safetensors")}


def _part(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = tree.get(name)
    return part if isinstance(part, Mapping) else {}


def _note_state_files(states: tuple[dict[str, Path], dict[str, Path]], findings: Findings) -> None:
    if not states[0] or not states[1]:
        which = "neither has" if not states[0] and not states[1] else f"{'B' if states[0] else 'A'} has no"
        findings.not_compared.append(f"arguments, environment and data: {which} a state file of this package")
        return
    for side, mine, theirs in (("A", states[0], states[1]), ("B", states[1], states[0])):
        only = [(name, f"only in {side}") for name in sorted(mine.keys() - theirs.keys())]
        if only:
            findings.add("ranks", len(only), only)


def _compare_trainer_states(a: Path, b: Path, findings: Findings) -> None:
    if not any((checkpoint / "trainer_state.json").exists() for checkpoint in (a, b)):
        return  # of a loop on accelerate, whose progress is in the state files
    one, other = read_trainer_state(a), read_trainer_state(b)
    rows = _log_rows(a, one), _log_rows(b, other)
    for index in range(max(map(len, rows))):
        pair = [side[index] if index < len(side) else {} for side in rows]
        where = next((row["step"] for row in pair if "step" in row), "?")
        findings.add_trees("log", pair[0], pair[1], f"step {where}: ")
    findings.add_trees("progress", _progress(one), _progress(other))


def _log_rows(checkpoint: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = state.get("log_history", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise StateFileError(checkpoint / "trainer_state.json", "log_history is no list of rows")
    return [{name: row[name] for name in row if not name.endswith(_CLOCK_FIELDS)} for row in rows]


def _progress(state: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in state.items() if name not in _NOT_STATE}
    best = state.get("best_model_checkpoint")
    kept["best_model_checkpoint"] = Path(best).name if isinstance(best, str) else best
    kept["stateful_callbacks"] = without_mark(state.get("stateful_callbacks"))
    return kept


def _compare_weights(a: Path, b: Path, findings: Findings) -> None:
    first, second = tensors_of(a), tensors_of(b)
    findings.add("weights", len(first.keys() | second.keys()), differing_leaves(first, second))


def _compare_torch_files(a: Path, b: Path, findings: Findings, trees: Sequence[tuple[str, Trees]]) -> None:
    marks = [dict(_part(tree, "identity")) for _, pair in trees for tree in pair]  # accelerate stores it for us
    for name, group in torch_files(names_in(a, b)):
        if group == RNG and trees:
            continue  # the generators are compared from the state files
        if not (a / name).is_file() or not (b / name).is_file():
            findings.add(group, 1, [(name, f"only in {'A' if (a / name).is_file() else 'B'}")])
            continue
        one, other = load_torch(a / name), load_torch(b / name)
        if group == REGISTERED and one in marks and other in marks:
            continue
        findings.add_trees(group, one, other, f"{Path(name).stem}: " if group == REGISTERED else "")


def _compare_parts(pair: Trees, findings: Findings, prefix: str) -> None:
    one, other = _part(pair[0], "parts"), _part(pair[1], "parts")
    findings.add_trees("RNG", _part(one, "randomness"), _part(other, "randomness"), prefix)
    stopping = [_without_clocks(_part(side, "early_stopping")) for side in (one, other)]
    findings.add_trees("early stopping", stopping[0], stopping[1], prefix)
    # The digests of the weights are left out: the weights themselves were compared.
    rest = {"randomness", "early_stopping", "weights"}
    for name in sorted((one.keys() | other.keys()) - rest):
        findings.add_trees("training loop", one.get(name), other.get(name), f"{prefix}{name}.")
    findings.add_trees("objects", _part(pair[0], "objects"), _part(pair[1], "objects"), prefix)


def _without_clocks(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_clocks(value) if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if name not in _CLOCKS
    }


def _compare_other_files(a: Path, b: Path, findings: Findings) -> None:
    names = plain_files(names_in(a, b))
    if names:
        findings.add("other files", len(names), _differing_files(a, b, names))


def _differing_files(a: Path, b: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        if not (a / name).is_file() or not (b / name).is_file():
            yield name, f"only in {'A' if (a / name).is_file() else 'B'}"
        elif digest_file(a / name) != digest_file(b / name):
            yield name, "other bytes"
