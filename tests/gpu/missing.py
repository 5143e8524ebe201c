"""Prints the wheels of a folder whose package is not installed: ``python missing.py DIR``."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    try:
        importlib.metadata.version(wheel.name.partition("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
