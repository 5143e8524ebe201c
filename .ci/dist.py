"""Builds sdist and wheel into dist/, checks them, and runs README's first example from the wheel alone: `make dist`.

The wheel is built from the sdist, so that the sdist is complete. It is installed into a fresh environment, in the
versions of constraints.txt, and the example runs in an empty folder, where the source tree cannot be imported.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
GIVEN = """\
import torch
from transformers import Trainer, TrainingArguments, set_seed

import hf_lifecycle

assert "site-packages" in hf_lifecycle.__file__, hf_lifecycle.__file__
set_seed(0)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.mse_loss(self.layers(x).squeeze(-1), labels)}


rows = [{"x": row, "labels": row.sum()} for row in torch.randn(48, 4)]
train, evaluation = rows[:32], rows[32:]
settings = {"max_steps": STEPS, "save_steps": 2, "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none"}
model, args = Net(), TrainingArguments("runs/demo", **settings)
"""
ENDING = 'print("ended at step", trainer.state.global_step)\n'


def run(*command: str | Path, **options: object) -> str:
    """What ``command`` prints; its output is shown where it fails."""
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if ran.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def environment(place: Path, *requirements: str | Path) -> Path:
    """A fresh virtual environment with ``requirements``; the folder of its programs."""
    venv.create(place, with_pip=True)
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    flags = os.environ.get("PIP_FLAGS", "").split()
    run(programs / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q", *flags, *requirements)
    return programs


def check_contents(wheel: Path) -> int:
    """Every module of the package is in the wheel, and nothing beside it; the number of modules."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_lifecycle").rglob("*.py")}
    packaged = {name for name in names if ".dist-info/" not in name}
    if packaged != modules | {"hf_lifecycle/py.typed"}:
        raise SystemExit(f"{wheel.name}: other files than the package: {sorted(packaged ^ modules)}")
    for ending in ("METADATA", "entry_points.txt", "licenses/LICENSE"):
        if not any(name.endswith(f".dist-info/{ending}") for name in names):
            raise SystemExit(f"{wheel.name}: lacks {ending}")
    return len(modules)


def first_example() -> str:
    """The first Python block of README."""
    found = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def main() -> None:
    """Build, check, install, run."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as place:
        tools = environment(Path(place, "tools"), "build", "twine")
        run(tools / "python", "-m", "build", "--outdir", DIST, ROOT)
        wheel, sdist = next(DIST.glob("*.whl")), next(DIST.glob("*.tar.gz"))
        print(run(tools / "python", "-m", "twine", "check", "--strict", wheel, sdist).strip())
        print(f"{wheel.name}: {check_contents(wheel)} modules")

        fresh = environment(Path(place, "fresh"), "-c", ROOT / "constraints.txt", wheel)
        folder = Path(place, "empty")
        folder.mkdir()
        outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        for steps in (4, 6):  # a start, and a resume
            script = GIVEN.replace("STEPS", str(steps)) + first_example() + ENDING
            (folder / "example.py").write_text(script, encoding="utf-8")
            printed = run(fresh / "python", "example.py", cwd=folder, env=outside)
            if f"ended at step {steps}" not in printed:
                raise SystemExit(printed)
        run(fresh / "hf-lifecycle", "verify", "runs/demo", cwd=folder, env=outside)
        print("README's first example started, resumed and verified from the wheel alone")


if __name__ == "__main__":
    main()
