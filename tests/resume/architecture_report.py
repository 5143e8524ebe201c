"""Writes docs/architectures.md: what a stock resume loses of every architecture, and whether it comes back.

From the repository's root: ``python -m tests.resume.architecture_report``. Each environment measures its own version of
transformers; run it in several, and each adds its column to the numbers that the page keeps beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from .architecture_scan import scan
from .tiny_models import LARGEST, Architecture, CannotBuild, find_architectures

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
NUMBERS = PAGE.with_suffix(".json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]

HEAD = """# Architectures whose weights Trainer loses on resume

Written by `python -m tests.resume.architecture_report`; do not edit.

`save_pretrained` renames, splits or fuses the tensors of many architectures, so that its files keep the names of the
published checkpoints. `Trainer` resumes with `load_state_dict(strict=False)`, which does not undo that: the tensors
keep the values that the new process gave them, and only a warning says so. `LifecycleCallback` compares every tensor
with the digest taken at the save, reads the lost ones with the model class's own `from_pretrained`, and compares again.
If a tensor still differs, an error names it.

Measured on tiny models (at most {largest:,} parameters) that are created from their configuration, with every
architecture of transformers that can be created this way. Each is saved and loaded into a model with other weights, by
the calls that Trainer makes. Then all parameters and buffers are compared bit for bit, in float32 and in bfloat16.
`tests/resume/test_architectures.py` repeats the scan, and trains, interrupts and resumes.

One architecture cannot be repaired: transformers 5.23 cannot resume a `deepseek_v4` at all. Trainer reads the
checkpoint's `config.json` with the base class, which refuses the layer types of that architecture before any callback
runs.
"""


def _measure(architecture: Architecture) -> Row:
    row: Row = {"class": architecture.class_name}
    for name, dtype in DTYPES.items():
        try:
            found = scan(architecture, dtype)
        except CannotBuild as error:
            return {**row, "reason": str(error)}
        row[name] = {"tensors": found.tensors, "lost": len(found.lost), "unrepaired": len(found.unrepaired)}
        if found.unrepaired:
            row[name]["first"] = found.unrepaired[0]
    return row


def _cell(row: Row | None, dtype: str = "float32") -> str:
    if row is None:
        return "not in it"
    if "reason" in row:
        return "not built"
    return f"{row[dtype]['lost']} of {row[dtype]['tensors']}"


def _lost(row: Row | None) -> bool:
    return row is not None and "reason" not in row and any(row[dtype]["lost"] for dtype in DTYPES)


def _repaired(rows: list[Row | None]) -> str:
    losing = [row for row in rows if row is not None and _lost(row)]
    left = [row for row in losing if any(row[dtype]["unrepaired"] for dtype in DTYPES)]
    if not left:
        return "yes"
    unrepaired = max(row[dtype]["unrepaired"] for row in left for dtype in DTYPES)
    return f"**no**: {unrepaired} tensors left"


def _counts(rows: Mapping[str, Row]) -> tuple[int, int, int, int]:
    built = [row for row in rows.values() if "reason" not in row]
    losing = [row for row in built if _lost(row)]
    repaired = [row for row in losing if not any(row[dtype]["unrepaired"] for dtype in DTYPES)]
    return len(rows), len(built), len(losing), len(repaired)


def render(numbers: Mapping[str, Mapping[str, Row]]) -> str:
    """The page for ``numbers``: version of transformers to architecture to what was measured."""
    versions = sorted(numbers, key=lambda version: [int(part) for part in version.split(".")[:3] if part.isdigit()])
    lines = [HEAD.format(largest=LARGEST), "", "| transformers | known | built | lose weights | repaired |"]
    lines += ["|---|---|---|---|---|"]
    lines += ["| " + " | ".join(map(str, (version, *_counts(numbers[version])))) + " |" for version in versions]
    names = sorted({name for version in versions for name in numbers[version]})
    table = {name: [numbers[version].get(name) for version in versions] for name in names}
    lines += ["", "## Tensors lost by a stock resume", ""]
    lines += ["| architecture | class | " + " | ".join(f"lost in {version}" for version in versions) + " | repaired |"]
    lines += ["|---" * (len(versions) + 3) + "|"]
    for name, rows in table.items():
        if any(_lost(row) for row in rows):
            known = next(row["class"] for row in reversed(rows) if row is not None)
            lines.append(f"| {name} | {known} | " + " | ".join(_cell(row) for row in rows) + f" | {_repaired(rows)} |")
    newest = numbers[versions[-1]]
    kept = [name for name, row in newest.items() if "reason" not in row and not _lost(row)]
    lines += ["", f"## Nothing lost in {versions[-1]} ({len(kept)})", "", ", ".join(kept) + "."]
    lines += [
        "",
        f"## Not built in {versions[-1]}, so not measured",
        "",
        "| architecture | why |",
        "|---|---|",
    ]
    lines += [f"| {name} | {_escaped(row['reason'])} |" for name, row in newest.items() if "reason" in row]
    return "\n".join(lines) + "\n"


def _escaped(reason: str) -> str:
    return reason.split(" from <module")[0].replace("|", "\\|")[:120]


def main() -> int:
    """Measure the installed version and write the page."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    measured = {architecture.name: _measure(architecture) for architecture in find_architectures()}
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {}
    numbers[transformers.__version__] = measured
    NUMBERS.write_text(json.dumps(numbers, sort_keys=True, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    PAGE.write_text(render(numbers))
    print(
        f"{PAGE.name}: transformers %s: known %d, built %d, losing %d, repaired %d"
        % (transformers.__version__, *_counts(measured))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
