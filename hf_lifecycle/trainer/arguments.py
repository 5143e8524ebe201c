"""Which training arguments decide the bits of a run.

Every argument that is not left out is compared on resume. Those named here break exactness when they differ, and so do
those that a subclass has added, of which nothing is known; the others of ``TrainingArguments`` (how often one
evaluates, saves and logs, how many workers make map-style batches) are harmless to the weights.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import numpy as np
from transformers import TrainingArguments

from hf_lifecycle.state.environment import Difference, Grade, compare

__all__ = ["capture_arguments", "compare_arguments"]

_DECIDE = frozenset(
    """
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    average_tokens_across_devices label_smoothing_factor neftune_noise_alpha
    bf16 fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
    activation_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel liger_kernel_config auto_find_batch_size full_determinism seed data_seed use_cpu
    accelerator_config parallelism_config fsdp fsdp_config deepspeed
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    dataloader_drop_last dataloader_in_order remove_unused_columns label_names
    group_by_length train_sampling_strategy length_column_name ignore_data_skip
""".split()  # noqa: SIM905
)

_LEAVE_OUT = frozenset(
    """
    output_dir logging_dir run_name project report_to log_level log_level_replica disable_tqdm resume_from_checkpoint
    local_rank push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    trackio_space_id trackio_bucket_id trackio_static_space_id do_train do_eval do_predict overwrite_output_dir
""".split()  # noqa: SIM905
)

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_GRADES = dict.fromkeys(_DECIDE, Grade.BREAKS)


def capture_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments as plain data, as ``TrainingArguments.to_dict`` gives them."""
    return {
        name: _plain(value)
        for name, value in args.to_dict().items()  # type: ignore[no-untyped-call]
        if name not in _LEAVE_OUT
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(item)) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return _ADDRESS.sub("", str(value))  # which another process has elsewhere


def compare_arguments(saved: dict[str, Any], present: dict[str, Any], *, iterable: bool) -> list[Difference]:
    """What differs, graded. ``iterable``: the training data is a stream, which its workers share out among them."""
    own = {field.name for field in fields(TrainingArguments)}
    grades = dict.fromkeys((saved.keys() | present.keys()) - own, Grade.BREAKS)
    grades |= _GRADES | ({"dataloader_num_workers": Grade.BREAKS} if iterable else {})
    return compare(saved, present, grades, otherwise=Grade.HARMLESS)
