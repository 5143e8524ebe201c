"""Tiny models of every architecture that transformers can build from a configuration alone.

Promise: no download, the same weights for the same seed, at most :data:`LARGEST` parameters, and an architecture that
cannot be built is named with its reason. Not promised: that a tiny model is a sensible one, or that it can be trained.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import constants as hub_constants
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .tiny_shapes import NUMBERS, OVERRIDES, SEQUENCES, TOKENS

__all__ = ["LARGEST", "Architecture", "CannotBuild", "build", "find_architectures", "quiet", "tiny_config"]

LARGEST = 2_000_000

# The first mapping that knows an architecture decides its head, so that each is built once, with the head it is
# usually trained with.
_HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "VIDEO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "SEQUENCE_CLASSIFICATION",
    "PRETRAINING",
    "",
)


class CannotBuild(Exception):
    """An architecture has no tiny model; the message says why."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture: its ``model_type``, the kind of its head and the name of its class."""

    name: str
    head: str
    class_name: str


def _mapping_names(head: str) -> Mapping[str, Any]:
    name = f"MODEL_FOR_{head}_MAPPING_NAMES" if head not in ("", "PRETRAINING") else "MODEL_MAPPING_NAMES"
    if head == "PRETRAINING":
        name = "MODEL_FOR_PRETRAINING_MAPPING_NAMES"
    return getattr(modeling_auto, name, {})


def find_architectures() -> list[Architecture]:
    """Every architecture of the installed transformers, by name, with the head it is scanned with."""
    found: dict[str, Architecture] = {}
    for head in _HEADS:
        for name, class_name in _mapping_names(head).items():
            first = class_name[0] if isinstance(class_name, (tuple, list)) else class_name
            if name in CONFIG_MAPPING_NAMES and name not in found:
                found[name] = Architecture(name, head, first)
    return [found[name] for name in sorted(found)]


def _shrink(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``plain`` that a tiny model changes, nested configurations included."""
    changed: dict[str, Any] = {}
    spare_token = 20
    for key, value in plain.items():
        if isinstance(value, Mapping) and "model_type" in value:
            inner = _merge(_shrink(value), OVERRIDES.get(value["model_type"], {}))
            changed[key] = {**inner, "model_type": value["model_type"]}
        elif key == "rope_parameters" and isinstance(value, Mapping) and "mrope_section" in value:
            changed[key] = {**value, "mrope_section": [1, 1, 2]}  # half of a head of 8
        elif key in NUMBERS and isinstance(value, (int, float)) and not isinstance(value, bool):
            changed[key] = min(NUMBERS[key], value) if value > 0 else value
        elif key in SEQUENCES and isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
            changed[key] = type(value)(SEQUENCES[key] * len(value) if len(SEQUENCES[key]) == 1 else SEQUENCES[key])
        elif key.endswith(("token_id", "token_index", "_token_ids")) and value is not None:
            if key in TOKENS:
                changed[key] = TOKENS[key]
            elif isinstance(value, int) and value >= 0:
                changed[key], spare_token = spare_token, spare_token + 1
    if "kv_lora_rank" in changed and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = changed["num_attention_heads"]  # latent attention has as many
    return changed


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def tiny_config(name: str) -> Any:
    """The configuration of the architecture ``name``, shrunk.

    Raises:
        CannotBuild: The configuration refuses.
    """
    try:
        config_class = CONFIG_MAPPING[name]
        config = config_class(**_merge(_shrink(config_class().to_dict()), OVERRIDES.get(name, {})))
    except Exception as error:
        raise CannotBuild(f"config: {_one_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = TOKENS["pad_token_id"]
    return config


def _one_line(error: BaseException) -> str:
    text = re.sub(r"/\S*site-packages/", "", " ".join(str(error).split()))  # of whichever machine
    return f"{type(error).__name__}: {text}"[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings, for tiny configurations are odd, nor downloads, which some constructors begin."""
    logger = logging.getLogger("transformers")
    level, offline = logger.level, hub_constants.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    hub_constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        hub_constants.HF_HUB_OFFLINE = offline


def model_class(architecture: Architecture, config: Any) -> type[PreTrainedModel]:
    """The class that ``architecture`` is scanned with."""
    mapping: Any = _LazyAutoMapping(CONFIG_MAPPING_NAMES, _mapping_names(architecture.head))
    found = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


@functools.cache
def _size(architecture: Architecture) -> int:
    """How many parameters the tiny model has, counted without making them."""
    config = tiny_config(architecture.name)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(architecture, config)(config).parameters())


def build(architecture: Architecture, seed: int = 0) -> PreTrainedModel:
    """A tiny model in float32 on the CPU, in evaluation mode, its weights drawn from ``seed`` alone.

    Raises:
        CannotBuild: It cannot be built, or not with at most :data:`LARGEST` parameters.
    """
    with quiet():
        try:
            if _size(architecture) > LARGEST:
                raise CannotBuild(f"{_size(architecture) / 1e6:.1f} M parameters after shrinking")
            config = tiny_config(architecture.name)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return model_class(architecture, config)(config).eval()
        except CannotBuild:
            raise
        except Exception as error:
            raise CannotBuild(_one_line(error)) from error
