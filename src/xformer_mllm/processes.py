"""Runs of several processes: which one writes and prints, and how all make the same decision.

torchrun and `accelerate launch` start a process for each device and describe it in environment variables, from which
accelerate builds the process group. A single process needs none.
"""

import atexit
import ctypes
import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed, nn

T = TypeVar("T")

# The others wait while the first one hashes frozen weights, reads a checkpoint or describes held-out images.
TIMEOUT = timedelta(minutes=30)


def join(timeout: timedelta = TIMEOUT) -> PartialState:
    """Join the process group, if there is one; return this process's rank and device."""
    process = PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
    multiply_fp32_by_onednn()
    keep_freed_memory()
    if process.num_processes > 1:
        atexit.register(_outlive_the_collectives)
    return process


def multiply_fp32_by_onednn() -> None:
    """Let a CPU's oneDNN multiply fp32 matrices where that is exact: on AMD's Zen 5 it is twice as fast as MKL.

    The setting that chooses oneDNN also allows it to round to bf16, which it does where bf16 is faster (AMX). There it is
    set back.
    """
    if not torch.backends.mkldnn.is_available():
        return
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, products.fp32_precision = products.fp32_precision, "bf16"
    some = torch.linspace(0, 1, 256 * 256).view(256, 256)
    if not torch.allclose((some @ some).double(), some.double() @ some.double(), rtol=1e-5):
        products.fp32_precision = before


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next one.

    By default it returns it to the system, and a step on a CPU spends up to 15 % on page faults to get it back
    (docs/performance.md). The most that a process uses is the same.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the highest that glibc accepts
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


LOADERS = 4  # of each GPU


def loaders(asked: int | None) -> int:
    """The number of processes that load data: as asked; else 4 beside a GPU, and none on a CPU, which is busy itself."""
    if asked is not None:
        return asked
    return min(LOADERS, cores()) if PartialState().device.type == "cuda" else 0


def _outlive_the_collectives() -> None:
    """Wait for gloo's threads to free the last tensors they sent, a moment after the collective has returned.

    A thread that finds the interpreter gone aborts the process.
    """
    time.sleep(0.2)


def is_first() -> bool:
    return PartialState().is_main_process


def on_first(decide: Callable[[], T]) -> T:
    """Call `decide` on the first process and return its result on all of them.

    If it raises ValueError or OSError, the first process raises it and the others exit silently.
    """
    found: list = [None, False]
    error = None
    if is_first():
        try:
            found[0] = decide()
        except (ValueError, OSError) as raised:
            error, found[1] = raised, True
    result, failed = broadcast_object_list(found)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return result


def together(build: Callable[[], T]) -> T:
    """Call `build` on each process and return its result. If one fails, all end and the first one reports why."""
    result, error = None, None
    try:
        result = build()
    except (ValueError, OSError) as raised:
        error = raised
    everyone = gather_object([None if error is None else str(error)])
    if any(everyone):
        if not is_first():
            raise SystemExit(2)
        if error is not None:
            raise error
        rank, why = next((rank, why) for rank, why in enumerate(everyone) if why)
        raise ValueError(f"process {rank}: {why}")
    return result  # type: ignore[return-value]


def take_weights_of_first(model: nn.Module) -> None:
    """Broadcast the first process's trainable parameters to all processes."""
    if distributed.is_initialized():
        for parameter in model.parameters():
            if parameter.requires_grad:
                distributed.broadcast(parameter.data, 0)


def described() -> str:
    """Describe how many processes share the work, and how."""
    process = PartialState()
    if process.num_processes == 1:
        here = torch.cuda.device_count()
        hint = f"; to use all {here} GPUs: torchrun --no-python --nproc-per-node {here} xformer ..."
        return f"1 process on {process.device}{hint if here > 1 else ''}"
    how = "DDP"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        how = "DDP (accelerate has no FSDP for CPUs)" if process.device.type == "cpu" else "FSDP"
    return f"{process.num_processes} processes on {process.device.type}, {how}"
