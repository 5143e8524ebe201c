"""Run the notebooks from top to bottom and write them back with the outputs of it.

    python notebooks/refresh.py [NAME ...]        (make notebooks)

Each runs in an empty folder of its own, so that the paths in its outputs are the short
ones that it gave. What differs from machine to machine or from day to day is taken out
of the outputs: times of day, addresses, and whatever names this machine's folders.
Durations stay; they are what they were on the machine that ran it. A picture gets
the alternative text that its cell has as metadata (``alt``).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
TIMEOUT = 300  # seconds a cell

_TIMES = (
    (re.compile(r'(<time datetime=")[^"]*(">)[^<]*(</time>)'), r"\1\2–\3"),
    (
        re.compile(
            r"\d{4}-\d{2}-\d{2}[ T]\d{2}:\d{2}(:\d{2}(\.\d+)?)?([+-]\d{2}:\d{2}|Z)?"
        ),
        "····-··-·· ··:··",
    ),
    (re.compile(r" at 0x[0-9a-f]{6,}"), ""),
)


def notebooks() -> list[Path]:
    """Every notebook, in its order."""
    return sorted(HERE.glob("[0-9][0-9]_*.ipynb"))


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run one notebook in ``folder``.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cell.metadata.pop("execution", None)
    # The kernel writes its history and its connection file: not into anyone's home.
    environment = {
        **os.environ,
        "IPYTHONDIR": str(folder / ".ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / ".jupyter"),
    }
    # Where there is no ipywidgets, tqdm says so in every notebook.
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    return notebook


def clean(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Take out of the outputs what is of this machine or of this moment."""
    paths = sorted(
        {
            str(folder),
            os.path.realpath(folder),
            str(HERE.parent),
            sys.prefix,
            str(Path.home()),
        },
        key=len,
    )
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for holder, key in _texts(output):
                text = "".join(holder[key])
                for place in reversed(paths):
                    text = text.replace(place + os.sep, "").replace(place, ".")
                for pattern, replacement in _TIMES:
                    text = pattern.sub(replacement, text)
                holder[key] = text
            if "image/png" in output.get("data", {}) and "alt" in cell.metadata:
                output.metadata["image/png"] = {"alt": cell.metadata["alt"]}
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }


def _texts(output: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where an output holds text."""
    if "text" in output:
        yield output, "text"
    data = output.get("data", {})
    yield from (
        (data, kind)
        for kind in data
        if kind.startswith("text/") or kind == "image/svg+xml"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "names", nargs="*", help="such as 01_quickstart; all where none is given"
    )
    wanted = parser.parse_args().names
    for path in notebooks():
        if wanted and path.stem not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(path, Path(folder))
            clean(notebook, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size >> 10} KiB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
