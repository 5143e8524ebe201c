"""The page "What we rely on" (docs/relied-on.md), made of the tables of names.

From the repository's root: ``python -m tests.field.reliance`` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hf_lifecycle import torch_internals
from hf_lifecycle.hosts.accelerate import intercept as accelerate_names
from hf_lifecycle.hosts.trainer import intercept as transformers_names
from hf_lifecycle.relied_on import Unpromised

PAGE = Path(__file__).resolve().parents[2] / "docs" / "relied-on.md"
_INTRODUCTION = """\
# What we rely on

Names that the libraries do not promise to keep, and what each is used for. If a newer version lacks one, the package
does without it, as the table says. For Trainer and the Accelerator, one warning when training begins names those that
are missing. A test checks that the package uses these names only in the modules of these tables.

Made by `python -m tests.field.reliance` from the tables in the modules.
"""
_SECTIONS: dict[str, Iterable[Unpromised]] = {
    "Trainer (transformers): `hf_lifecycle/hosts/trainer/intercept.py`": transformers_names.RELIED_ON,
    "TRL's trainers and the reporters of transformers, where they have them": transformers_names.USED_WHERE_PRESENT,
    "Accelerator (accelerate): `hf_lifecycle/hosts/accelerate/intercept.py`": (
        *accelerate_names.RELIED_ON,
        *accelerate_names.USED_IN_TESTING,
    ),
    "torch and NumPy: `hf_lifecycle/torch_internals.py`": torch_internals.RELIED_ON,
}


def page() -> str:
    """The page, as Markdown."""
    text = _INTRODUCTION
    for heading, rows in _SECTIONS.items():
        text += f"\n## {heading}\n\n| name | used for | without it | public alternative |\n|---|---|---|---|\n"
        for row in rows:
            names = ", ".join(f"`{name}`" for name in row)
            text += f"| {names} | {row.purpose} | {row.without} | {row.public} |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
