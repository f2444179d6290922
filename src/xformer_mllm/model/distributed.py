"""Gathering over processes; the identity on one process, with no process group needed."""

import torch
from torch import distributed


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """All rows on every process; backward sums what all processes' losses say about this process's rows."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(_world_size())]
        distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # torch.distributed.nn.functional.all_gather gives wrong sums for gradients that are not contiguous (gloo).
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(_world_size())[rank()]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """[B, ...] of each process -> [processes * B, ...] on all of them, in the order of their ranks, with gradient.

    The gradient of every process's loss flows back to the process that owns the row. As DDP averages over processes,
    N processes of batch b give the gradient of one process of batch N * b. All processes must bring the same shape.
    """
    return tensor if _world_size() == 1 else _Gather.apply(tensor.contiguous())


__all__ = ["gather", "rank"]
