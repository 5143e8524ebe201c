"""Makes the pictures of README and docs: `make pictures`.

The run's timeline is drawn from a real run: ``training.py`` is started, killed with SIGKILL, started again, sent
SIGTERM, and started once more. The diagrams and badges are drawn by ``diagrams.py``. Each picture is written twice, for
a light and for a dark background.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from diagrams import BADGES, DIAGRAMS

from hf_lifecycle import Run

HERE = Path(__file__).parent
INK = {"light": "#1f2328", "dark": "#e6edf3"}
SIGNALS = ((133, signal.SIGKILL), (227, signal.SIGTERM))


def train(output_dir: Path) -> None:
    """Train in three processes, the first two of which are ended by a signal."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "training.py"), str(output_dir)]
    for ended_at, number in (*SIGNALS, (None, None)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == str(ended_at):
                    process.send_signal(number)
        if process.returncode != -(number or 0):
            raise SystemExit(f"the training ended with status {process.returncode}, not by signal {number}")


def timeline(output_dir: Path) -> str:
    """The picture that a notebook shows of the run, as an SVG of its own."""
    drawn = re.search(r"<svg.*</svg>", Run(output_dir)._repr_html_(), re.DOTALL)
    assert drawn is not None
    font = (
        'xmlns="http://www.w3.org/2000/svg" font-family="system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif"'
    )
    return drawn[0].replace("<svg", f"<svg {font}", 1)


def write(name: str, picture: str) -> None:
    """Write ``picture`` in both colours; its words and lines are drawn in ``currentColor``."""
    for theme, ink in INK.items():
        file = HERE / f"{name}-{theme}.svg"
        file.write_text(picture.replace("<svg", f'<svg color="{ink}"', 1) + "\n", encoding="utf-8")
        print(file.relative_to(HERE.parent.parent))


def main() -> None:
    """Make all of them; with an argument, of a run that is there."""
    for name, badge in BADGES.items():
        (HERE / f"{name}.svg").write_text(badge + "\n", encoding="utf-8")
    for name, diagram in DIAGRAMS.items():
        write(name, diagram)
    with tempfile.TemporaryDirectory() as place:
        output_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(place, "run")
        if not output_dir.exists():
            train(output_dir)
        write("run", timeline(output_dir))


if __name__ == "__main__":
    main()
