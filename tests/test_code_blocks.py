"""Every Python block of README and docs runs as it is printed, and the API reference builds without a warning."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

import hf_lifecycle

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if "```python" in page.read_text()
)
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(x).squeeze(-1)
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


def _arguments(output_dir: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=2,
        report_to=[],
        disable_tqdm=True,
    )


def given() -> dict[str, Any]:
    """What a page takes as given: a script with a Trainer, in the current directory."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(32, 4, generator=generator)
    data = [{"x": row, "labels": row.sum()} for row in rows]
    return {
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "torch": torch,
        "model": _Net(),
        "args": _arguments("runs/demo"),
        "make_model": _Net,
        "make_arguments": _arguments,
        "set_seed": set_seed,
        "train": data[:24],
        "evaluation": data[24:],
        "ema": torch.nn.Linear(1, 1),
        **_loop(data),
    }


def _loop(data: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """What a loop of one's own takes as given beside the model."""
    optimizer = torch.optim.AdamW(_Net().parameters())
    return {
        "loader": torch.utils.data.DataLoader(data, batch_size=8, shuffle=True),
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "evaluate": lambda model: 0.5,
    }


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_python_blocks_of_the_page_run_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    blocks = list(_BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    names = given()
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), names)
    for name, test in list(names.items()):
        if name.startswith("test_"):
            test(*[tmp_path / name] * test.__code__.co_argcount)


# What fits into the column of a page, and of the reference, at a window of 1200 pixels: site.css sets the size of code.
COLUMNS, REFERENCE_COLUMNS = 104, 98


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_code_of_a_page_fits_its_column(page: Path) -> None:
    if "_build" in page.parts:
        return
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    code = "\n".join(block for kind, block in blocks if not kind.startswith("{"))  # else it is a directive
    assert [line for line in code.splitlines() if len(line) > COLUMNS] == []


def test_code_of_the_reference_fits_its_column() -> None:
    wide = []
    for path in (ROOT / "hf_lifecycle").rglob("*.py"):
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        wide += [line for line in lines if line.startswith((">>> ", "... ")) and len(line) > REFERENCE_COLUMNS]
    assert wide == []


@pytest.mark.slow
def test_the_site_and_its_reference_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", ROOT / "docs", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "api.html").read_text()
    missing = [name for name in hf_lifecycle.__all__ if f">{name}</span>" not in reference and name != "__version__"]
    assert missing == []
    _require_first_page(tmp_path)
    _require_search(tmp_path)


def _require_first_page(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    assert f"hf_lifecycle {hf_lifecycle.__version__}" in page
    assert "Apache-2.0" in page[page.index("Copyright") :][:200]
    for name in ("og:title", "og:description"):
        assert re.search(rf'<meta[^>]*property="{name}"|<meta[^>]*"{name}"[^>]*>', page), name


def _require_search(site: Path) -> None:
    """The search finds what a user looks for, on the page that tells of it; words are indexed by their stems."""
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[len("Search.setIndex(") : text.rindex(")")])
    for word, page in {"patienc": "early_stopping", "sigterm": "preemption", "corrupt": "failure-model"}.items():
        found = [index[kind].get(word, []) for kind in ("terms", "titleterms")]
        pages = {index["docnames"][one] for each in found for one in (each if isinstance(each, list) else [each])}
        assert page in pages, f"{word}: {sorted(pages)}"
