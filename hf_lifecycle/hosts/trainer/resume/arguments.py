"""Which training arguments decide the bits of a run.

Every argument that is not left out is compared on resume. Each field of ``TrainingArguments`` is named here with its
grade; so are those of the library's own subclasses that do not decide the bits. Whatever else differs, such as what a
user's subclass has added, breaks exactness: nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from hf_lifecycle.state.environment import Difference, Grade, compare
from hf_lifecycle.state.values.described import described, description_digest

__all__ = ["Steering", "capture_arguments", "compare_arguments"]

# They decide what is trained on, what is computed from it, and in which order it is summed. use_cache is the model's
# config's: with it models of some kinds make their masks and run their kernels otherwise, also in training.
_DECIDE = frozenset(
    """
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    average_tokens_across_devices label_smoothing_factor neftune_noise_alpha
    bf16 fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
    activation_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_cache
    use_liger_kernel liger_kernel_config auto_find_batch_size full_determinism seed data_seed use_cpu
    accelerator_config parallelism_config fsdp fsdp_config deepspeed
    ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    dataloader_drop_last dataloader_in_order remove_unused_columns label_names
    group_by_length train_sampling_strategy length_column_name ignore_data_skip
""".split()  # noqa: SIM905
)

# They decide when there is an evaluation and what its metrics are: harmless unless evaluations steer training.
# logging_nan_inf_filter leaves losses out of the mean, those of an evaluation too.
_OF_EVALUATIONS = frozenset(
    """
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size prediction_loss_only
    metric_for_best_model greater_is_better include_for_metrics batch_eval_metrics eval_do_concat_batches
    eval_use_gather_object logging_nan_inf_filter
    predict_with_generate generation_max_length generation_num_beams
""".split()  # noqa: SIM905
)

# They decide which checkpoints there are: harmless unless the best of them is what training ends with.
_OF_SAVES = frozenset({"save_strategy", "save_steps"})

# How workers share a map-style data set out decides nothing: each batch has random numbers of its own. A stream is
# dealt out among them, and what lives in a worker sees one pass of it or all.
_OF_STREAMS = frozenset({"dataloader_num_workers", "dataloader_persistent_workers"})

# Where and how often something is shown, kept or moved. The dtype of *_full_eval is cast to outside training only.
_HARMLESS = frozenset(
    """
    eval_accumulation_steps fp16_full_eval bf16_full_eval load_best_model_at_end
    save_total_limit save_only_model save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint
    logging_strategy logging_first_step logging_steps log_on_each_node include_num_input_tokens_seen
    dataloader_pin_memory dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_timeout debug skip_memory_metrics torch_empty_cache_steps
""".split()  # noqa: SIM905
)

_LEFT_OUT = frozenset(
    """
    output_dir logging_dir run_name project report_to log_level log_level_replica disable_tqdm resume_from_checkpoint
    local_rank push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    trackio_space_id trackio_bucket_id trackio_static_space_id do_train do_eval do_predict overwrite_output_dir
""".split()  # noqa: SIM905
)

# The same for the arguments of TRL, where they are TRL's: all others of its own decide the bits.
_HARMLESS_OF_TRL = frozenset(
    """
    log_completions_hub_repo log_multimodal
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
""".split()  # noqa: SIM905
)
_OF_EVALUATIONS_OF_TRL = frozenset({"eval_packing", "num_generations_eval", "generate_during_eval"})


@dataclass(frozen=True, slots=True)
class Steering:
    """What decides about training beside the optimizer's steps.

    Attributes:
        evaluations: Whether training depends on their metrics: a schedule, early stopping, the best weights at its end.
        best: Whether it ends with the best weights that were saved.
        streamed: Whether the training data is a stream.
    """

    evaluations: bool
    best: bool
    streamed: bool


def capture_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments as plain data. What is called a token is secret, and only its digest is taken."""
    return {
        name: description_digest(value) if name.endswith("_token") and value is not None else described(value)
        for name, value in _arguments(args)
        if name not in _LEFT_OUT
    }


def _arguments(args: TrainingArguments) -> Iterator[tuple[str, Any]]:
    """Every field, and the plain values that were set on the object beside them."""
    own = [field.name for field in fields(args) if field.init]
    yield from ((name, getattr(args, name)) for name in own)
    for name, value in vars(args).items():
        if name not in own and not name.startswith("_") and type(value) in (bool, int, float, str):
            yield name, value


def compare_arguments(
    saved: dict[str, Any], present: dict[str, Any], kind: type[TrainingArguments], steering: Steering
) -> list[Difference]:
    """What differs, graded.

    Args:
        saved: What :func:`capture_arguments` gave at the save.
        present: What it gives now.
    """
    of_trl = any(one.__module__.partition(".")[0] == "trl" for one in kind.__mro__)
    harmless = _HARMLESS | (_HARMLESS_OF_TRL if of_trl else frozenset())
    if not steering.evaluations:
        harmless |= _OF_EVALUATIONS | (_OF_EVALUATIONS_OF_TRL if of_trl else frozenset())
    if not steering.best:
        harmless |= _OF_SAVES
    if not steering.streamed:
        harmless |= _OF_STREAMS
    return compare(saved, present, dict.fromkeys(harmless, Grade.HARMLESS), otherwise=Grade.BREAKS)
