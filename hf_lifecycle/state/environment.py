"""Where a run runs, and what differs between two of these places, graded by what it does to exactness.

Promise: equal environments compare equal; every difference is reported with both values. What the grades mean is
written at :class:`Grade`. Not seen: drivers and firmware that do not tell torch their version.
"""

from __future__ import annotations

import enum
import functools
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from hf_lifecycle.messages import cut

__all__ = ["Difference", "Grade", "capture_environment", "capture_versions", "compare"]

_PACKAGES = ("torch", "transformers", "accelerate", "numpy", "safetensors", "datasets", "peft", "trl", "hf-lifecycle")

# What makes it as it was, where one thing does.
_NEXT = {name: f"pip install {name}=={{}}" for name in _PACKAGES} | {"cpu_threads": "set OMP_NUM_THREADS={}"}


class Grade(enum.Enum):
    """What a difference does to a resumed run."""

    HARMLESS = "harmless"  # the same bits come out
    NO_EFFECT = "no effect"  # the same bits come out, since what was saved takes the place of what was changed
    BREAKS = "breaks exactness"  # the run continues, as another run
    FATAL = "fatal"  # the run cannot continue

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was when the checkpoint was saved."""

    name: str
    saved: Any
    present: Any
    grade: Grade
    why: str = ""

    @property
    def is_harmless(self) -> bool:
        """Whether the same bits come out."""
        return self.grade in (Grade.HARMLESS, Grade.NO_EFFECT)

    def __str__(self) -> str:
        has_next = self.name in _NEXT and self.saved is not None and not self.is_harmless
        why = self.why or (_NEXT[self.name].format(self.saved) if has_next else "")
        grade = f"{self.grade}: {why}" if why else str(self.grade)
        return f"{self.name}: {cut(repr(self.saved))} -> {cut(repr(self.present))} ({grade})"


_GRADES = {
    "python": Grade.HARMLESS,
    "hf-lifecycle": Grade.HARMLESS,
    "host": Grade.HARMLESS,
    "world_size": Grade.FATAL,
}


def capture_environment(*, world_size: int) -> dict[str, Any]:
    """Versions, hardware and numerical switches of this process, as plain data."""
    import torch  # not needed for the versions

    environment = capture_versions()
    environment |= {
        "world_size": world_size,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_threads": torch.get_num_threads(),
        "accelerators": _accelerators(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if torch.cuda.is_available():
        environment["cuda"] = torch.version.cuda
        environment["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        environment["cudnn_benchmark"] = torch.backends.cudnn.benchmark
    return environment


def capture_versions() -> dict[str, Any]:
    """The host, and the versions of Python and the packages; torch is not imported."""
    found: dict[str, Any] = {"python": platform.python_version(), "host": platform.node()}
    return found | {name: _version(name) for name in _PACKAGES}


@functools.cache  # of what this process has loaded; reading it takes milliseconds, and every save asks
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _accelerators() -> list[str]:
    import torch

    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    module = torch.get_device_module(kind.type)
    if not hasattr(module, "get_device_name"):
        return [kind.type] * torch.accelerator.device_count()
    return [str(module.get_device_name(index)) for index in range(torch.accelerator.device_count())]


def compare(
    saved: Mapping[str, Any],
    present: Mapping[str, Any],
    grades: Mapping[str, Grade] = _GRADES,
    *,
    otherwise: Grade = Grade.BREAKS,
    leave_out: Iterable[str] = (),
) -> list[Difference]:
    """Every name whose values differ, or that only one side has, in the order of ``saved``."""
    names = [*saved, *(name for name in present if name not in saved)]
    skip = set(leave_out)
    return [
        Difference(name, saved.get(name), present.get(name), grades.get(name, otherwise))
        for name in names
        if name not in skip and saved.get(name) != present.get(name)
    ]
