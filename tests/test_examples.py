"""The demonstration shows what it says it shows, ends its processes, and compares bits rather than numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from tests import preloaded

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = EXAMPLES / "mlm_demo"


def demo_command(output_dir: Path) -> list[str]:
    return [sys.executable, str(DEMO / "demo.py"), "--quick", "--output-dir", str(output_dir)]


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(DEMO))
    import comparison

    yield comparison
    sys.modules.pop("comparison")


@pytest.mark.slow
def test_demo_ends_identical_with_the_callback_and_says_so(tmp_path: Path) -> None:
    ran = preloaded.run(
        demo_command(tmp_path), launches=True, capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\x1b" not in ran.stdout, "no colour codes where there is no terminal"
    words = " ".join(ran.stdout.split())
    assert "LifecycleCallback: killed (SIGKILL) after step" in words
    assert "LifecycleCallback: resumed from checkpoint-10" in words
    assert "identical (28 tensors)" in words
    assert "ended with exactly the bits of the uninterrupted run" in words


@pytest.mark.slow
def test_interrupted_demo_leaves_no_process(tmp_path: Path) -> None:
    demo = preloaded.Popen(demo_command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        children: list[psutil.Process] = []
        while len(children) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            children = psutil.Process(demo.pid).children(recursive=True)
        os.kill(demo.pid, signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 130, output
    assert "every process was ended" in output
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_comparison_tells_minus_zero_from_zero_and_takes_a_nan_for_itself(comparison: ModuleType) -> None:
    assert not comparison.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not comparison.same_bits(0.0, -0.0)
    assert comparison.same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert comparison.same_bits(float("nan"), float("nan"))


def test_comparison_tells_dtypes_and_shapes_apart(comparison: ModuleType) -> None:
    ones = torch.ones(4)
    assert not comparison.same_bits(ones, ones.double())
    assert not comparison.same_bits(ones, ones.reshape(2, 2))
    assert not comparison.same_bits(1, 1.0)
    assert comparison.same_bits(torch.tensor(1.0), torch.tensor(1.0))


def test_comparison_counts_what_differs_and_by_how_much(comparison: ModuleType) -> None:
    one = {"a": torch.zeros(3), "b": torch.ones(2)}
    other = {"a": torch.zeros(3), "b": torch.tensor([1.0, 1.5])}
    assert comparison.compare_tensors("weights", one, one).words == "identical (2 tensors)"
    finding = comparison.compare_tensors("weights", one, other)
    assert (finding.identical, finding.words) == (False, "1 of 2 DIFFER (by 5e-01)")
    assert not comparison.compare_tensors("weights", one, {"a": one["a"]}).identical


def test_comparison_of_logs_leaves_out_only_what_a_clock_wrote(comparison: ModuleType) -> None:
    row = {"step": 5, "eval_loss": 0.5, "eval_runtime": 1.0, "eval_samples_per_second": 3.0}
    assert comparison.compare_logs([row], [{**row, "eval_runtime": 2.0, "eval_samples_per_second": 1.5}]).identical
    assert not comparison.compare_logs([row], [{**row, "eval_loss": 0.25}]).identical
    assert not comparison.compare_logs([row], [row, row]).identical
    assert not comparison.compare_logs([row], [{"step": 5, "eval_runtime": 1.0}]).identical


@pytest.mark.slow
def test_spot_example_goes_on_after_sigterm_and_ends_with_the_weights_of_the_run_that_got_none(tmp_path: Path) -> None:
    def spot(output_dir: Path) -> subprocess.Popen[str]:
        command = [sys.executable, str(EXAMPLES / "spot.py"), "--output-dir", str(output_dir), "--epochs", "1"]
        return preloaded.Popen(command, stdout=subprocess.PIPE, text=True)

    with spot(tmp_path / "whole") as whole, spot(tmp_path / "run") as run:
        assert run.stdout is not None
        assert "loss" in run.stdout.readline()
        run.terminate()
        run.wait(timeout=120)
        ends = whole.communicate(timeout=300)[0].splitlines()[-1]
    assert run.returncode == -signal.SIGTERM
    with spot(tmp_path / "run") as again:
        assert again.communicate(timeout=300)[0].splitlines()[-1] == ends
    assert ends.startswith("step 47: weights ")


def test_slurm_example_is_a_script_that_bash_can_read() -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sbatch")], check=True)


SLOWLY = """
import os, runpy, sys, time, torch
import sklearn.datasets
from transformers import Trainer
import hf_lifecycle.hosts.trainer
stack = torch.stack
if slow := float(sys.argv.pop(1)):  # seconds for each column of a batch
    torch.stack = lambda *args: (time.sleep(slow), stack(*args))[1]
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()) + 12)  # however long the imports took
    open(os.environ["ENDS"], "w").write(os.environ["SLURM_JOB_END_TIME"])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_slurm_example_is_requeued_before_its_time_limit_and_ends_as_a_job_without_one(tmp_path: Path) -> None:
    """The scheduler sets what SLURM sets; a job that has not ended when its time has is sent a signal."""
    commands, queue, slowly, ends = (tmp_path / name for name in ("bin", "queue", "slowly.py", "ends"))
    commands.mkdir()
    slowly.write_text(SLOWLY)
    run = f'shift 2\nexec {sys.executable} {slowly} "$SLOW" "$@"'  # --kill-on-bad-exit=1 python
    for name, body in {"srun": run, "scontrol": f'echo "$@" >> {queue}'}.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    output_dir = tmp_path / "run"

    def job(slow: float) -> tuple[int, str]:
        env = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLOW": str(slow), "SLURM_JOB_ID": "7"}
        env |= {"SLURM_JOB_END_TIME": str(int(time.time()) + 600), "ENDS": str(ends)}
        command = ["bash", str(EXAMPLES / "slurm.sbatch"), str(output_dir)]
        ended = subprocess.run(command, cwd=EXAMPLES.parent, env=env, capture_output=True, text=True, check=False)
        return ended.returncode, ended.stderr + ended.stdout

    status, said = job(slow=0.2)
    assert status == 143, said
    assert time.time() < int(ends.read_text()) + 1  # when SLURM would send the first signal
    assert "time limit: saving step" in said
    assert queue.read_text().split() == ["requeue", "7"]
    status, said = job(slow=0.0)
    assert status == 0, said
    assert '"event": "resumed"' in (output_dir / "lifecycle.jsonl").read_text()
    command = [sys.executable, str(slowly), "0", str(EXAMPLES / "spot.py"), "--output-dir", str(tmp_path / "whole")]
    whole = preloaded.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=True).stdout
    ends_with = said.splitlines()[-1]
    assert whole.splitlines()[-1] == ends_with
    assert ends_with.startswith("step 141: weights ")
    assert queue.read_text().split() == ["requeue", "7"]
