"""The notebooks run from top to bottom where nothing is prepared, and are committed with the outputs of a real run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests import preloaded

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))

# What a machine leaves in outputs: folders, the day, the address of an object.
OF_A_MACHINE = re.compile(
    r"/(home|root|tmp|work|usr|Users|content)/|site-packages|20\d\d-\d\d-\d\d| at 0x[0-9a-f]+|https?://"
)

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {notebooks!r})
import nbformat, refresh
folder = Path("run")
folder.mkdir()
notebook = refresh.run(Path({path!r}), folder.resolve())
refresh.clean(notebook, folder.resolve())
nbformat.write(notebook, "after.ipynb")
"""


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shape(cell: Any) -> list[Any]:
    """What kinds of outputs a cell has; what is said on standard error is the libraries', and of their versions."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return sorted({(output.output_type, *sorted(output.get("data", {}))) for output in outputs})


def texts(notebook: Any) -> str:
    """All text of all outputs."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    shown = [data[kind] for output in outputs for data in [output.get("data", {})] for kind in data if "text/" in kind]
    return "\n".join([*(output.get("text", "") for output in outputs), *shown])


def test_there_are_notebooks() -> None:
    assert len(PATHS) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom_as_it_was_committed(path: Path, tmp_path: Path) -> None:
    # In a process of its own: a client leaves threads and an event loop behind.
    code = RUN.format(notebooks=str(NOTEBOOKS), path=str(path))
    command = [sys.executable, "-c", code]
    ran = preloaded.run(command, launches=True, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    after, committed = nbformat.read(tmp_path / "after.ipynb", 4), nbformat.read(path, 4)
    assert [shape(cell) for cell in code_cells(after)] == [shape(cell) for cell in code_cells(committed)]
    assert not OF_A_MACHINE.search(texts(after))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_clean_outputs_of_one_run(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    assert any(cell.outputs for cell in cells)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not OF_A_MACHINE.search(texts(notebook))
    assert not OF_A_MACHINE.search("\n".join(cell.source for cell in cells))
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_first_cell_installs_the_package_only_where_it_is_missing(path: Path) -> None:
    first = code_cells(nbformat.read(path, 4))[0].source
    assert re.search(r"except ImportError:\n    %pip install -q .*hf-lifecycle", first)
