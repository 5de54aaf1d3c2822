"""Kernels for GPUs, on a CPU: Triton's interpreter is chosen before Triton is loaded."""

from __future__ import annotations

import importlib.util
import os

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]  # Triton is for Linux
