"""The notebooks run from top to bottom where nothing is prepared, and are committed with the outputs of a real run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
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
    assert [path.name[:2] for path in PATHS] == ["01", "02", "03", "04", "05"]


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
def test_pictures_have_words_and_what_libraries_say_is_short(path: Path) -> None:
    for cell in code_cells(nbformat.read(path, 4)):
        for output in cell.outputs:
            data = output.get("data", {})
            assert "image/png" not in data or output.metadata["image/png"]["alt"], cell.source
            assert "<svg" not in data.get("text/html", "") or 'aria-label="' in data["text/html"], cell.source
        assert sum(len(output.text) for output in cell.outputs if output.get("name") == "stderr") < 500, cell.source


def test_quickstart_makes_model_data_and_trainer_in_short_cells() -> None:
    cells = code_cells(nbformat.read(NOTEBOOKS / "01_quickstart.ipynb", 4))
    assert all(len(cell.source.splitlines()) < 25 for cell in cells[:6])


def _wheel(folder: Path) -> Path:
    """A wheel with the package's name and nothing in it."""
    path = folder / "hf_lifecycle-9.9-py3-none-any.whl"
    info = "hf_lifecycle-9.9.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("hf_lifecycle/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hf-lifecycle\nVersion: 9.9\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def _machine_without_the_package(folder: Path) -> Path:
    """The Python of an environment with everything that this one has, but for the package."""
    venv.create(folder / "venv")
    packages = Path(sysconfig.get_paths()["purelib"])
    linked = folder / "packages"
    linked.mkdir()
    for one in packages.iterdir():
        if "hf_lifecycle" not in one.name and not one.name.startswith("_virtualenv") and one.suffix != ".pth":
            (linked / one.name).symlink_to(one)
    (inside,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (inside / "others.pth").write_text(f"{linked}\n")
    return folder / "venv" / "bin" / "python"


@pytest.mark.slow
def test_first_cell_installs_a_wheel_where_no_index_has_the_package_and_says_so(tmp_path: Path) -> None:
    python = _machine_without_the_package(tmp_path)
    (tmp_path / "work").mkdir()
    first = code_cells(nbformat.read(NOTEBOOKS / "01_quickstart.ipynb", 4))[0].source
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-c", first], cwd=tmp_path / "work", env=outside, capture_output=True, text=True, timeout=200
        )

    nothing = run()
    assert nothing.stderr.endswith("ImportError: upload a wheel of hf_lifecycle, and run this cell again\n")
    wheel = _wheel(tmp_path / "work")
    assert (run().stdout, run().stdout) == (f"installed {wheel.name}\n", "installed already\n")


def test_all_first_cells_are_the_same_but_for_what_the_notebook_needs() -> None:
    firsts = [code_cells(nbformat.read(path, 4))[0].source for path in PATHS]
    same = {re.sub(r"(modules|pip) = \[[^]]*\]", "", first) for first in firsts}
    assert len(same) == 1
