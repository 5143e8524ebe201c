"""What is relied on in a library without being promised by it: what for, and what is lost where a version lacks it.

Everything that depends on such a name has a plain way without it. Each library has one module that knows its names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Unpromised", "report_missing"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unpromised:
    """Names that serve one purpose.

    Attributes:
        names: As the library has them, with spaces between.
        purpose: What they are for.
        without: What is lost where one of them is missing.
        public: What the library promises that comes near, and why it does not do.
    """

    names: str
    purpose: str
    without: str
    public: str

    def __iter__(self) -> Iterator[str]:
        return iter(self.names.split())


def report_missing(where: str, table: Iterable[Unpromised], has: Callable[[str], bool]) -> None:
    """Warn once of all names that are missing; ``where``: the library, its version, and what of it lacks them."""
    lost = [f"\n  no {name}: {row.without}" for row in table for name in row if not has(name)]
    if lost:
        logger.warning(
            "%s lacks names that hf_lifecycle relies on. What is lost:%s\n  Next: look for a newer hf_lifecycle.",
            where,
            "".join(lost),
        )
