"""Gathering over processes; the identity on one process, with no process group needed."""

import torch
from torch.distributed.nn.functional import all_gather


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """[B, ...] of each process -> [processes * B, ...] on all of them, in the order of their ranks, with gradient.

    The gradient of every process's loss flows back to the process that owns the row. As DDP averages over processes,
    N processes of batch b give the gradient of one process of batch N * b. All processes must bring the same shape.
    """
    if _world_size() == 1:
        return tensor
    if not tensor.requires_grad:
        parts = [torch.empty_like(tensor) for _ in range(_world_size())]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    return torch.cat(all_gather(tensor.contiguous()))


__all__ = ["gather", "rank"]
