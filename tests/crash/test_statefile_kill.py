"""A process that dies or runs out of disk while saving leaves the file of the save before, or the new one, whole."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest

from tests import preloaded

# One process imports torch once and forks the processes that are killed.
KILLED = """
import os, random, signal, sys, time
import torch
from hf_lifecycle.checkpoint.files.statefile import read_tree, write_tree

path = sys.argv[1]
write_tree(path, {"n": 0, "x": torch.zeros(50_000)}, kind="test")
seen, moments, inside = 0, random.Random(0), 0
for done in range(1, 401):  # a busy machine needs more of them
    child = os.fork()
    if child == 0:
        n = seen
        while True:
            n += 1
            write_tree(path, {"n": n, "x": torch.full((50_000,), float(n))}, kind="test")
    time.sleep(moments.uniform(0.002, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tree = read_tree(path, kind="test")
    assert (tree["x"] == float(tree["n"])).all() and tree["n"] >= seen, (tree["n"], seen)
    seen = tree["n"]
    for name in os.listdir(os.path.dirname(path)):
        if name.endswith(".tmp"):
            inside += 1
            os.unlink(os.path.join(os.path.dirname(path), name))
    if done >= 40 and min(seen, inside) > 5:
        break
print(seen, inside)
"""

FULL = """
import os, random, resource, sys
import torch
from hf_lifecycle.errors import LifecycleError
from hf_lifecycle.training_state import TrainingStateManager

folder = sys.argv[1]
manager = TrainingStateManager()
for name in ("a.pt", "a.safetensors"):
    path = os.path.join(folder, name)
    manager.save_state(path, epoch=1, step=1)
    old = open(path, "rb").read()
    for limit in (0, 1, 100, 5_000, 100_000, 399_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            manager.save_state(path, epoch=2, step=2, custom_state={"x": torch.zeros(100_000)})
        except OSError as error:
            fault = error
        else:
            raise AssertionError(f"a file of {limit} bytes was enough")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert fault.filename == path and "File too large" in str(fault), fault
        assert open(path, "rb").read() == old
        assert not [other for other in os.listdir(folder) if other.endswith(".tmp")]
    manager.save_state(path, epoch=2, step=2, custom_state={"x": torch.zeros(100_000)})
    assert manager.load_state(path)["epoch"] == 2
print("whole")
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")


def run(script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = preloaded.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_kill_at_any_moment_of_a_save_leaves_a_whole_file(tmp_path, suffix):
    saves, inside = map(int, run(KILLED, tmp_path / f"state{suffix}"))
    assert saves > 5
    assert inside > 5  # so many kills struck while a file was being written


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(tmp_path):
    assert run(FULL, tmp_path) == ["whole"]
