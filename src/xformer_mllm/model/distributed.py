"""Gathering over processes; the identity on one process, with no process group needed.

The average of the processes' mean losses equals the mean over the joint batch only if all of them have equally many items.
`share` corrects for that: DDP and FSDP average gradients over processes, so N processes of batch b give the gradient of
one process of batch N * b, whatever the lengths of their texts.
"""

import torch
from torch import distributed


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """All rows on every process; backward sums the gradients of all processes' losses for this process's rows."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # torch.distributed.nn.functional.all_gather returns wrong sums for non-contiguous gradients (gloo).
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """[B, ...] of each process -> [processes * B, ...] on all of them, in the order of their ranks, with gradient.

    The gradient of every process's loss flows back to the process that owns the row. As DDP averages over processes,
    N processes of batch b give the gradient of one process of batch N * b. Shapes must be the same on all processes.
    """
    return tensor if world_size() == 1 else _Gather.apply(tensor.contiguous())


def equally_long(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids and their mask [B, T] on the right to the longest T of all processes, for `gather`.

    Padding becomes 0 on every process, so that equal texts are equal rows.
    """
    if world_size() == 1:
        return ids, mask
    longest = torch.tensor(ids.shape[1], device=ids.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    missing = (0, int(longest) - ids.shape[1])
    pad = torch.nn.functional.pad
    return pad(ids.masked_fill(mask == 0, 0), missing), pad(mask, missing)


def share(items: torch.Tensor) -> torch.Tensor | float:
    """Weight of this process's mean, so that the average over processes is the mean over the joint batch.

    Args:
        items: a mask of what the mean is over, true (or 1) for every token or pair that counts.

    Returns:
        This process's number of items over the processes' average number of them; 1 on one process.
    """
    if world_size() == 1:
        return 1.0
    own = (items != 0).sum().double()
    total = own.clone()
    distributed.all_reduce(total)
    return (own * world_size() / total).float()


__all__ = ["equally_long", "gather", "rank", "share", "world_size"]
