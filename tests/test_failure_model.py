"""Every test that the failure model names as its proof exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "failure-model.md"


def test_every_test_that_the_failure_model_names_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8")))
    assert len(named) > 15
    missing = [
        f"{path}::{name}" for path, name in sorted(named) if f"def {name}(" not in (ROOT / path).read_text("utf-8")
    ]
    assert missing == []
