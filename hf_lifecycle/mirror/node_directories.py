"""The checkpoint that all nodes resume from, where each node has a directory of its own.

A save is committed on each node. A kill between two commits leaves some nodes one checkpoint behind the others, and a
node may have lost its disk. So the nodes agree: on the newest checkpoint, or the one before it, if every node has it
intact.

Promise: every rank is given the same step of the same save, which its own node has and every byte of which verifies; or
every rank raises the same error, which lists what each node has. Nothing is removed. Not promised: that the directories
are not one; that is found when training begins.
"""

from __future__ import annotations

import logging
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

from hf_lifecycle.checkpoint.directory.listing import older_attempts
from hf_lifecycle.checkpoint.directory.lock import wait_for
from hf_lifecycle.checkpoint.directory.manifest import read_manifest
from hf_lifecycle.checkpoint.directory.store import PREFIX, checkpoints_in, moved_aside
from hf_lifecycle.checkpoint.directory.verification import in_brief, verify
from hf_lifecycle.errors import NoCommonCheckpoint, StateFileError
from hf_lifecycle.messages import listed
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["agreed_checkpoint", "common_checkpoint"]

logger = logging.getLogger("hf_lifecycle")


class _Key(NamedTuple):
    """One save.

    Attributes:
        step: Optimizer steps done.
        attempt: The training that saved it; empty where there is no manifest to tell.
    """

    step: int
    attempt: str

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.step}"


def agreed_checkpoint(directory: Path, ranks: Ranks, nodes: Nodes, *, mirror: Mirror | None) -> Path | None:
    """The checkpoint in this node's ``directory`` that all nodes resume from; None if no node has one.

    Args:
        directory: The output directory of this rank's node.
        ranks: The processes of the training.
        nodes: Which of them share a directory.
        mirror: Where copies are, if anywhere.

    Raises:
        NoCommonCheckpoint: The nodes have none in common; on every rank.
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
        self._seen: dict[
            _Key, list[str | None]
        ] = {}  # by node: what is wrong with it; empty: nothing; None: it is missing

    def reach(self) -> Path | None:
        """The checkpoint; what is skipped for it is logged."""
        found = self.common()
        if found is None and any(told["has"] or told["bad"] for told in self._told):
            raise NoCommonCheckpoint(self._directory, self._table())
        if self._ranks.is_main and len(self._seen) > 1:
            logger.warning("%s is the newest checkpoint that every node has:%s", found, listed(self._table()))
        return found

    def common(self) -> Path | None:
        """The newest checkpoint that every node has."""
        self._told = self._look()
        older = {attempt for told in self._told for attempt in told["older"]}
        having = [{_Key(*key) for key in told["has"].values()} for told in self._told]
        keys = {key for has in having for key in has if key.attempt not in older}
        for key in sorted(keys, key=lambda one: (-one.step, -sum(one in has for has in having))):
            self._verify(key)
            if not any(problem != "" for problem in self._seen[key]):
                return self._directory / key.name
        return None

    def _look(self) -> list[dict[str, Any]]:
        """What each node has, as its manifests tell."""
        with self._ranks.agree(what="looking at the checkpoints of each node"):
            if self._nodes.leads:
                wait_for(self._directory)
                self._own = _contents_of(self._directory)
        told = self._ranks.gather(self._own, what="telling what each node has")
        return [told[rank] for rank in self._nodes.leaders]

    def _verify(self, key: _Key) -> None:
        """Find out which nodes have this checkpoint intact."""
        problem = None
        with self._ranks.agree(what=f"verifying {key.name} on each node"):
            if self._nodes.leads and self._own["has"].get(key.name) == list(key):
                path = self._directory / key.name
                problem = in_brief(path, problems) if (problems := verify(path)) else ""
        told = self._ranks.gather(problem, what=f"telling whether {key.name} is intact")
        self._seen[key] = [told[rank] for rank in self._nodes.leaders]

    def _table(self) -> list[str]:
        """What each node has, a line for each."""
        lines = []
        for place, told in enumerate(self._told):
            words = dict.fromkeys(told["has"], "an older run's") | dict(told["bad"])
            words |= {name: "not needed" for name, key in told["has"].items() if _Key(*key) not in self._seen}
            for key, problems in self._seen.items():
                if told["has"].get(key.name) == list(key):
                    words[key.name] = problems[place] or "intact"
            has = "; ".join(f"{name}: {words[name]}" for name in sorted(words, key=_step_in, reverse=True))
            lines.append(f"rank {self._nodes.leaders[place]}, {told['directory']}: {has or 'no checkpoint'}")
        return lines


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
    return {"directory": f"{platform.node()}:{directory}", "has": has, "bad": bad, "older": older}


def _step_in(name: str) -> int:
    return int(re.sub(r"\D", "", name.partition(PREFIX)[2].partition(".")[0]))
