"""Where the tests of this folder train: on the CUDA device, or on the CPU where only their own course is tried."""

from __future__ import annotations

import os

import pytest
import torch

__all__ = ["DEVICE", "HAS_CUDA", "on_cuda", "on_device"]

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")

on_cuda = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
# GPU_DRY_RUN: run.sh --dry-run sets it.
on_device = pytest.mark.skipif(not HAS_CUDA and os.environ.get("GPU_DRY_RUN") != "1", reason="no CUDA device")
