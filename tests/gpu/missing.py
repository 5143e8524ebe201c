"""Prints the wheels of a folder whose package is not installed: ``python missing.py DIR``."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path


def main(folder: Path) -> None:
    for wheel in sorted(folder.glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.partition("-")[0])
        except importlib.metadata.PackageNotFoundError:
            print(wheel)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
