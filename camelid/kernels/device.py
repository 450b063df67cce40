"""What the GPU here can do, if there is one."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def compiles() -> bool:
    """Whether code can be made for a GPU here, torch.compile's or ours: it needs Triton, a C compiler and Python's
    headers."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang"))) and headers.exists()


def uncompiled() -> AbstractContextManager[object]:
    """While the block runs, compiled layers compute as they were written. Where nothing was compiled, the compiler,
    which is large, is not loaded for it."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def infers() -> bool:
    """Whether nothing is learned from what is computed here, so that a pass of our own may take torch's place. Not in a
    layer that is compiled: asking would cut it to pieces."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def runs_triton(x: Tensor) -> bool:
    """Whether kernels/gpu takes tensors such as this one."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.get_device() == torch.cuda.current_device()  # where Triton starts what it made
        and _multiplies_bfloat16(x.get_device())
        and compiles()
    )


@cache
def _multiplies_bfloat16(gpu: int) -> bool:
    return torch.cuda.get_device_capability(gpu) >= (8, 0)


def on_its_gpu(device: torch.device) -> AbstractContextManager[object]:
    """While the block runs, a model's GPU is the current one: streams, recorded steps and kernels of ours go there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_on_gpu() -> int:
    """Bytes of the current GPU that a tensor could take, those that torch keeps for itself included."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
