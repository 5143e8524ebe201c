"""The checkpoint that all nodes resume from, where each node has a directory of its own.

A save is committed on each node. A kill between two commits leaves some nodes one checkpoint behind the others, and a
node may have lost its disk, or have only old or damaged ones. So the nodes agree: on the newest checkpoint, or the one
before it, if every node has it intact; else on the newest that any of them or the mirror has, which the others fetch.
A copy of the mirror that does not arrive intact counts as none.

Promise: every rank is given the same step of the same save, which its own node has and every byte of which verifies;
or every rank raises an error, which lists what each node has. Nothing is removed: what is damaged is moved aside before
a fetched one takes its place. Not promised: that the directories are not one; that is found when training begins.

What one node gives to another is staged there, compared with the giver's manifest, and committed as any other, so that
a kill meanwhile leaves nothing that bears a checkpoint's name. What could not be read or written on one node is an
error on all.
"""

from __future__ import annotations

import json
import logging
import platform
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.checkpoint.directory.listing import older_attempts
from hf_lifecycle.checkpoint.directory.lock import wait_for
from hf_lifecycle.checkpoint.directory.manifest import manifest_path, parse_manifest, read_manifest
from hf_lifecycle.checkpoint.directory.store import PREFIX, checkpoints_in, moved_aside
from hf_lifecycle.checkpoint.directory.verification import in_brief, verify
from hf_lifecycle.checkpoint.files.progress_bar import reading
from hf_lifecycle.errors import MirrorError, MirrorOfAnotherRun, NoCommonCheckpoint, StateFileError
from hf_lifecycle.messages import listed
from hf_lifecycle.mirror.fetching import contents_of, fetch_copy, room_for
from hf_lifecycle.mirror.places import commit_copy
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.processes.file_transfer import FileTransfer
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["agreed_checkpoint", "common_checkpoint", "give_checkpoint"]

logger = logging.getLogger("hf_lifecycle")

# Saves that a kill leaves a node behind the others: all nodes commit a checkpoint before any of them begins the next.
_APART = 1


class _Key(NamedTuple):
    """One save: its step, and the training that saved it (empty where there is no manifest to tell)."""

    step: int
    attempt: str

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.step}"


def agreed_checkpoint(directory: Path, ranks: Ranks, nodes: Nodes, *, mirror: Mirror | None) -> Path | None:
    """The checkpoint in this node's ``directory`` that all nodes resume from; None if no node has one.

    Args:
        directory: The output directory of this rank's node.

    Raises:
        NoCommonCheckpoint: No node has one that is intact, nor has the mirror; on every rank.
        NotEnoughSpace: A disk is too full for what is to be fetched. On other ranks: ``RankFailed``.
        MirrorOfAnotherRun: The mirror belongs to another run. On other ranks: ``RankFailed``.
        RankFailed: Another node could not look at its directory.
    """
    assert nodes.several
    return _Agreement(directory, ranks, nodes, mirror).reach()


def common_checkpoint(directory: Path, ranks: Ranks, nodes: Nodes) -> Path | None:
    """The newest checkpoint that every node has intact; None where there is none. Called on every rank."""
    return _Agreement(directory, ranks, nodes, None).common() if nodes.several else None


class _Agreement:
    def __init__(self, directory: Path, ranks: Ranks, nodes: Nodes, mirror: Mirror | None) -> None:
        self._directory = directory
        self._ranks = ranks
        self._nodes = nodes
        self._mirror = mirror
        self._own: dict[str, Any] = {}
        self._told: list[dict[str, Any]] = []
        self._copies: set[_Key] = set()  # what the mirror has
        # For each node what is wrong with a save; empty: nothing; None: it does not have it. Newest first.
        self._seen: dict[_Key, list[str | None]] = {}

    def reach(self) -> Path | None:
        """The checkpoint; what is skipped for it is logged."""
        self._look()
        key = self._newest_common(apart=_APART)
        while key is None and (held := next(filter(self._is_held, self._seen), None)) is not None:
            if self._fetch(held):
                key = held
            else:  # the mirror's copy is damaged
                self._copies.discard(held)
                self._told[0]["mirror"].append(f"{held.name}: not intact, as logged where it was fetched")
                key = self._newest_common(apart=_APART)
        if key is None and any(told["has"] or told["bad"] or told["mirror"] for told in self._told):
            raise NoCommonCheckpoint(self._directory, self._table())
        if key is not None:
            is_fetched = any(told["has"].get(key.name) != list(key) for told in self._told)
            if next(iter(self._seen)) != key and not is_fetched and self._ranks.is_main:
                logger.warning("%s is the newest checkpoint that every node has:%s", key.name, listed(self._table()))
            self._fetch_best_of(key)
        return None if key is None else self._directory / key.name

    def common(self) -> Path | None:
        """The newest checkpoint that every node has."""
        self._look()
        key = self._newest_common(apart=None)
        return None if key is None else self._directory / key.name

    def _newest_common(self, *, apart: int | None) -> _Key | None:
        """The newest save that every node has intact, at most ``apart`` saves older than the newest of any node."""
        older = {attempt for told in self._told for attempt in told["older"]}
        has = self._copies.union(_Key(*key) for told in self._told for key in told["has"].values())
        keys = sorted((key for key in has if key.attempt not in older), key=lambda key: (-key.step, key.attempt))
        held = 0  # steps that were looked at since there was one that any node has
        for _, alike in groupby(keys, key=lambda key: key.step):
            if apart is not None and held > apart:
                break
            is_held = held > 0
            for key in alike:
                if key not in self._seen:
                    self._verify(key)
                if not self._lacking(key):
                    return key
                is_held |= self._is_held(key)
            held += is_held
        return None

    def _is_held(self, key: _Key) -> bool:
        """Whether a node or the mirror can give this save to others."""
        return key.attempt != "" and ("" in self._seen[key] or key in self._copies)

    def _look(self) -> None:
        """Find out what each node has, as its manifests tell."""
        with self._ranks.agree(what="looking at the checkpoints of each node"):
            if self._nodes.leads:
                wait_for(self._directory)
                self._own = _contents_of(self._directory)
                if self._mirror is not None and self._ranks.is_main:
                    self._look_at_mirror(self._mirror)
        told = self._ranks.gather(self._own, what="telling what each node has")
        self._told = [told[rank] for rank in self._nodes.leaders]
        self._copies = {_Key(*key) for key in self._told[0]["copies"]}

    def _look_at_mirror(self, mirror: Mirror) -> None:
        """On rank 0, whose checkpoints are copied there."""
        try:
            contents = contents_of(mirror, self._directory)
        except MirrorOfAnotherRun:
            raise
        except MirrorError as error:
            logger.warning("%s", error)
            self._own["mirror"] = [str(error)]
            return
        self._own["mirror"] = [*contents.unreadable]
        for copy in contents.copies:
            self._own["mirror"] += [f"{copy.name}: {problem}" for problem in copy.problems]
        self._own["copies"] = [[copy.step, copy.manifest.attempt] for copy in contents.copies if not copy.problems]
        self._own["older"] = sorted(older_attempts(self._directory, (copy.manifest for copy in contents.copies)))

    def _verify(self, key: _Key) -> None:
        """Find out which nodes have this save intact."""
        problem = None
        with self._ranks.agree(what=f"verifying {key.name} on each node"):
            if self._nodes.leads and self._own["has"].get(key.name) == list(key):
                path = self._directory / key.name
                problem = in_brief(path, problems) if (problems := verify(path)) else ""
        told = self._ranks.gather(problem, what=f"telling whether {key.name} is intact")
        self._seen[key] = [told[rank] for rank in self._nodes.leaders]

    def _fetch(self, key: _Key) -> bool:
        """Let every node have this save, from the mirror or from another node.

        Returns whether they have it; if not, only the mirror had it, and it did not arrive intact.
        """
        if key in self._copies and self._mirror is not None:
            with self._ranks.agree(what=f"fetching {key.name} from the mirror"):
                lacks = self._ranks.rank in self._lacking(key)
                got = lacks and fetch_copy(self._mirror, self._directory, *key)
            self._now_have(key, got)
        lacking = self._lacking(key)
        if len(lacking) == len(self._nodes.leaders):
            return False
        if lacking:
            giver = next(rank for rank in self._nodes.leaders if rank not in lacking)
            give_checkpoint(self._directory / key.name, giver, lacking, self._ranks, self._nodes)
            self._now_have(key, self._ranks.rank in lacking)
        return True

    def _fetch_best_of(self, key: _Key) -> None:
        """Let every node have the best checkpoint of this one as well, which Trainer may load at the end."""
        best = self._ranks.broadcast(
            _best_step(self._directory / key.name), what="telling which checkpoint is the best"
        )
        keys = [_Key(*told["has"].get(f"{PREFIX}{best}", (best, ""))) for told in self._told]
        found = next((one for one in keys if one.attempt and one != key), None)
        if found is not None and set(keys) != {found}:
            self._verify(found)
            if len(self._lacking(found)) < len(self._nodes.leaders):
                self._fetch(found)

    def _lacking(self, key: _Key) -> list[int]:
        """The first ranks of the nodes that do not have this save intact."""
        return [rank for rank, problem in zip(self._nodes.leaders, self._seen[key], strict=True) if problem != ""]

    def _now_have(self, key: _Key, got: bool) -> None:
        told = self._ranks.gather(got, what=f"telling who has fetched {key.name}")
        each = zip(self._nodes.leaders, self._seen[key], strict=True)
        self._seen[key] = ["" if told[rank] else problem for rank, problem in each]

    def _table(self) -> list[str]:
        """What each node has, a line for each."""
        lines = []
        for place, told in enumerate(self._told):
            words = dict.fromkeys(told["has"], "an older run's, or not needed") | dict(told["bad"])
            for key, problems in self._seen.items():
                if told["has"].get(key.name) == list(key):
                    words[key.name] = problems[place] or "intact"
            has = "; ".join(f"{name}: {words[name]}" for name in sorted(words, key=_step_in, reverse=True))
            lines.append(f"rank {self._nodes.leaders[place]}, {told['directory']}: {has or 'no checkpoint'}")
        return [*lines, *(f"mirror: {problem}" for problem in self._told[0]["mirror"])]


def _contents_of(directory: Path) -> dict[str, Any]:
    """What one node has: its checkpoints by name, and those that are known to be damaged."""
    has, bad = {}, {path.name: "damaged, and moved aside when a run started" for path in moved_aside(directory)}
    for step, path in checkpoints_in(directory):
        try:
            has[path.name] = [step, read_manifest(path).attempt]
        except FileNotFoundError:
            has[path.name] = [step, ""]
        except (StateFileError, OSError) as error:
            bad[path.name] = str(error)
    older = sorted(older_attempts(directory))
    return {
        "directory": f"{platform.node()}:{directory}",
        "has": has,
        "bad": bad,
        "older": older,
        "copies": [],
        "mirror": [],
    }


def _best_step(checkpoint: Path) -> int:
    """The step of the best checkpoint, as Trainer's state of this one tells; -1 where it tells none."""
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_bytes()).get("best_global_step")
    except (OSError, ValueError):
        return -1
    return step if isinstance(step, int) else -1


def _step_in(name: str) -> int:
    return int(re.sub(r"\D", "", name.partition(PREFIX)[2].partition(".")[0]))


def give_checkpoint(final: Path, giver: int, lacking: Sequence[int], ranks: Ranks, nodes: Nodes) -> None:
    """Send a checkpoint to the nodes that lack it; called on every rank.

    Args:
        final: The checkpoint on this rank's node.
        giver: The rank whose node has it intact.
        lacking: The first ranks of the nodes that lack it, or have another or a damaged one of this name.

    Raises:
        NotEnoughSpace: The disk of this node has no room for it.
        OSError: A file could not be read or written here.
        MirrorError: What arrived is not what was sent.
        RankFailed: Any of these on another rank.
    """
    with ranks.agree(what=f"reading the manifest of {final.name}"):
        own = manifest_path(final).read_bytes() if ranks.rank == giver else b""
    told = ranks.gather_bytes(own, what=f"the manifest of {final.name}")
    manifest, staged, takes = parse_manifest(manifest_path(final), told[giver]), final, ranks.rank in lacking
    size = sum(entry.size for entry in manifest.files)
    with ranks.agree(what=f"making room for {final.name}"):
        if takes:
            staged = room_for(final, size)
            staged.mkdir()
    try:
        with ranks.agree(what=f"giving {final.name} to the nodes that lack it"):
            transfer = FileTransfer(ranks, nodes)
            if nodes.leads:
                files = [(giver, entry.path, entry.size) for entry in manifest.files]
                to = ", ".join(map(str, lacking))
                with reading(f"sending {final.name} from rank {giver} to rank {to}", size) as advance:
                    transfer.send(files, staged, lambda _: takes, advance)
            if takes:
                if final.exists():
                    aside = store.move_aside(final).name
                    logger.warning("%s is not intact, or of another save; moved to %s", final, aside)
                commit_copy(staged, final, manifest)
                logger.info("%s: fetched from the node of rank %d", final, giver)
    finally:
        if takes:
            store.discard(staged)
