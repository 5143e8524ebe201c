"""What a loop is like beside its state: compared on resume, each difference graded by what it does to exactness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_lifecycle.accelerator.loaders import loader_facts
from hf_lifecycle.state.environment import Difference, Grade, capture_environment, compare

__all__ = ["capture_facts", "compare_facts"]

_LOADER = {"kind": Grade.HARMLESS, "num_workers": Grade.HARMLESS}
_STREAM = {"kind": Grade.HARMLESS, "num_workers": Grade.BREAKS}


def capture_facts(accelerator: Any, world_size: int) -> dict[str, Any]:
    """Environment, settings of the accelerator, and the loaders that it prepared: plain values."""
    return {
        "environment": capture_environment(world_size=world_size),
        "arguments": {
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "mixed_precision": str(accelerator.mixed_precision),
            "distributed_type": str(accelerator.distributed_type.value),
            "split_batches": bool(accelerator.split_batches),
            "models": len(accelerator._models),
            "optimizers": len(accelerator._optimizers),
            "schedulers": len(accelerator._schedulers),
        },
        "data": {f"loader {number}": loader_facts(one) for number, one in enumerate(accelerator._dataloaders)},
    }


def compare_facts(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[Difference]:
    """Everything that differs. Loaders that one side does not have are passed over: they may come, or be done with."""
    found = [
        *compare(saved["environment"], present["environment"]),
        *compare(saved["arguments"], present["arguments"], {}, otherwise=Grade.BREAKS),
    ]
    for name in saved["data"].keys() & present["data"].keys():
        stream = saved["data"][name]["is_stream"]
        differences = compare(saved["data"][name], present["data"][name], _STREAM if stream else _LOADER)
        found += [Difference(f"{name}, {one.name}", one.saved, one.present, one.grade) for one in differences]
    return found
