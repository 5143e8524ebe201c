"""What every test stands on: nothing is fetched, nothing is drawn at random, and nothing leaks from test to test.

A test that leaves an environment variable, a signal handler or a thread behind fails. Random number generators, which
every training moves, are seeded before each test and put back after it, and accelerate's process-wide singletons are
forgotten. Files of tests lie in ``tmp_path``: in memory where there is room, so that no test waits for a disk.
"""

from __future__ import annotations

import os

# Before transformers or datasets is imported: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Before numpy is: a process with more threads than one is no server to fork others from (preloaded.py).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import gc
import logging
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_lifecycle.processes.preemption import put_back_left_over

torch.set_num_threads(1)

# A shell that starts the tests in the background has them, and all their children, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Where there is room, ``tmp_path`` lies in memory: a save flushes many files, and a busy disk may take seconds each.
# What a killed process leaves behind is the same there. Tests of how files are written (saving/) stay on a disk.
IN_MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free >= ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))

# Set by pytest itself, or by the libraries under test as their way of telling child processes: accelerate's settings,
# and what torch's inductor and the Hub's client leave at first use.
HOST_VARIABLES = (
    *("PYTEST_", "ACCELERATE_", "FSDP_", "TORCHINDUCTOR_", "KMP_", "CUDA_MODULE_LOADING"),
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # where DeepSpeed is installed
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run all of the large sets, not a part (make test-all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first: what is wrong is told early. Of the large sets a part, unless all is asked for."""
    if not config.getoption("--exhaustive"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("exhaustive")])
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The process that is free first gets the next test; one gets all of a module that shares a training in it."""
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatIsShared(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if _shares(config.rootpath / module) else nodeid

        def _pending_of(self, workload: dict[str, dict[str, bool]]) -> int:
            for done in [scope for scope, tests in workload.items() if all(tests.values())]:
                del workload[done]  # which would be counted again after each test
            return super()._pending_of(workload)

    config.option.loadscopereorder = False
    return ByWhatIsShared(config, log)


@functools.cache
def _shares(module: Path) -> bool:
    text = module.read_text(encoding="utf-8") if module.suffix == ".py" else ""
    return 'fixture(scope="module")' in text or "mark.xdist_group(" in text


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _what_cannot_be_looked_at_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training continues over it, with a warning; a test shows the fault."""
    attributes = sys.modules.get("hf_lifecycle.state.values.attributes")
    if attributes is not None:

        def raised(what: str, error: Exception) -> None:
            raise error

        monkeypatch.setattr(attributes, "_give_up", raised)


@pytest.fixture(autouse=True)
def _packages_are_looked_for_once() -> None:
    """accelerate asks at every step of an optimizer which packages are installed, each time of the file system."""
    imports = sys.modules.get("accelerate.utils.imports")
    if imports is not None and not hasattr(imports._is_package_available, "cache_info"):
        imports._is_package_available = functools.cache(imports._is_package_available)


_modules_frozen = 0


@pytest.fixture(autouse=True)
def _collect_what_tests_make() -> None:
    """What is imported lives for good: the full collections of every training need not go through all of torch.

    Nor does each of a forked process, for which that is to copy every page that it goes through.
    """
    global _modules_frozen
    if len(sys.modules) != _modules_frozen:
        _modules_frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _same_levels_of_logs() -> Iterator[None]:
    """What a test makes the log say, as an example does that configures it, the next one does not find in it."""
    loggers = logging.getLogger(), logging.getLogger("hf_lifecycle")
    before = [one.level for one in loggers]
    yield
    for one, level in zip(loggers, before, strict=True):
        one.setLevel(level)


@pytest.fixture(autouse=True)
def _known_random_numbers() -> Iterator[None]:
    """Each test begins with the same random numbers, whichever ran before it, and leaves none of its own."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # else it is noted for later, with a stack trace each time
        torch.cuda.manual_seed_all(0)
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.fixture(autouse=True)
def _no_environment_leak() -> Iterator[None]:
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    leaked = [key for key in changed if not key.startswith(HOST_VARIABLES)]
    assert not leaked, f"the test left environment variables changed: {leaked}"


# SIGALRM is pytest-timeout's, which gives it back as soon as a test fails. SIGCHLD is DataLoader's: set once for the
# process at its first worker, never given back, and it must stay, or a worker's death would no longer be noticed.
HOST_SIGNALS = ("SIGALRM", "SIGCHLD")


def _handlers() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in signal.Signals if number.name not in HOST_SIGNALS}


@pytest.fixture(autouse=True)
def _no_signal_handler_leak() -> Iterator[None]:
    before = _handlers()
    yield
    put_back_left_over()  # a training that the test broke off by an exception; test_preemption.py says what these do
    changed = [number for number, handler in _handlers().items() if handler != before[number]]
    for number in changed:
        signal.signal(number, before[number])
    assert not changed, f"the test left signal handlers changed: {[number.name for number in changed]}"


@pytest.fixture(autouse=True)
def _no_thread_leak() -> Iterator[None]:
    """Daemon threads are the libraries' own (progress bars, pin_memory); any other has an owner that must end it."""
    before = set(threading.enumerate())

    def left() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]

    yield
    deadline = time.monotonic() + 2.0
    while left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left(), f"the test left threads running: {[thread.name for thread in left()]}"


@pytest.fixture(autouse=True)
def _no_accelerate_state() -> Iterator[None]:
    """accelerate keeps its settings in singletons; those of one test must not be the next one's."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
