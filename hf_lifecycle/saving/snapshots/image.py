"""Memory laid out like files, so that what a snapshot copies lies where it is written from, and is not copied again.

Promise: :meth:`Image.holds` is true only where every tensor that was laid out in the image is at its place of the file
to be written, and no other piece of that file would be put over one of them. Where it is not (an optimizer whose state
grew, a tensor that lies in its storage otherwise than it did), the file goes through blocks, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Image", "Plan", "address"]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a file is going to look like.

    Attributes:
        name: The file, by its path in the checkpoint.
        places: Where the bytes of whole storages begin in it, by a storage's number.
    """

    name: str
    size: int
    places: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Image:
    """Memory that is laid out like a file.

    Attributes:
        memory: It; longer than the file, up to a multiple of 4096 bytes.
        size: The bytes of the file.
        places: How many tensors lie in it.
    """

    memory: Bytes
    size: int
    places: int

    def holds(self, size: int, pieces: Iterable[tuple[int, Bytes]]) -> bool:
        """Whether a file can be written from here.

        Args:
            pieces: Where in it the bytes of each of its tensors begin, and where they are now.
        """
        begin, found = address(self.memory), 0
        for offset, data in pieces:
            at = address(data)
            if data.size and begin <= at < begin + self.memory.size:
                if at != begin + offset:
                    return False
                found += 1
        return found == self.places and size == self.size


def address(data: Bytes) -> int:
    """Where an array begins."""
    return int(data.__array_interface__["data"][0])
