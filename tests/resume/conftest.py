"""What the libraries under test leave behind for good, so that no test is blamed for it."""

from __future__ import annotations

import pytest
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler


@pytest.fixture(scope="session", autouse=True)
def _handler_of_worker_deaths() -> None:
    """torch sets its SIGCHLD handler with the first data worker of a process, and never again: before any test."""
    _set_SIGCHLD_handler()
