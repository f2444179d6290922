"""The losses of stage 1 as pure functions of tensors (paper section "Stage 1"; LAVIS blip2_qformer.py).

`B` this process's batch, `G` the batch of all processes, `Q` queries, `T` text tokens, `V` vocabulary, `D` width.
Nothing is random but the hard negatives. All results are fp32. The reconstruction loss is in `reconstruction.py`.
"""

import torch
from torch.nn.functional import cross_entropy, linear

IGNORED = -100  # target of a position without loss


def image_text_similarity(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Cosine of every image's best query with every text: unit-length [B, Q, D] and [G, D] -> fp32 [B, G]."""
    with torch.autocast(image_features.device.type, enabled=False):  # which would multiply in bf16
        return torch.einsum("bqd,gd->bgq", image_features.float(), text_features.float()).amax(-1)


def itc_loss(
    image_to_text: torch.Tensor, text_to_image: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.1
) -> torch.Tensor:
    """Image-text contrastive loss: the mean of both directions' cross-entropies.

    Args:
        image_to_text: similarities divided by the temperature, [B, G].
        text_to_image: the same for each text and all images, [B, G].
        targets: int64[B], the column of each row's own pair.
        label_smoothing: BLIP-2's 0.1.
    """
    return (
        cross_entropy(image_to_text, targets, label_smoothing=label_smoothing)
        + cross_entropy(text_to_image, targets, label_smoothing=label_smoothing)
    ) / 2


def sample_hard_negatives(similarity: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """Draw a negative column for each row, by the softmax of the similarity (multinomial, as in LAVIS).

    Args:
        similarity: divided by the temperature, [B, G].
        excluded: bool[B, G], true for the positive pair and for pairs with the same text, which are no negatives.

    Returns:
        int64[B]; -1 in a row without negatives.
    """
    weights = similarity.detach().float().masked_fill(excluded, -torch.inf).softmax(-1).nan_to_num()
    # multinomial refuses rows without weights (no candidates, or similarities that are nan). The loss is then nan, and the
    # training loop reports it with the batch.
    weights = weights.masked_fill(weights.sum(-1, keepdim=True) == 0, 1.0)
    return torch.multinomial(weights, 1).squeeze(1).masked_fill(excluded.all(-1), -1)


def itm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Image-text matching: cross-entropy of [P, 2] logits, averaged over the queries; label 1 is a pair; IGNORED is none."""
    return cross_entropy(logits.float(), labels)


def itg_targets(input_ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
    """Targets of image-grounded text generation: the token after each one, -100 where there is none.

    Args:
        input_ids: int64[B, T], the input ([DEC] first).
        text_mask: [B, T], 1 = token; padding is not a target.
    """
    following = input_ids.masked_fill(~text_mask.bool(), IGNORED)[:, 1:]
    return torch.nn.functional.pad(following, (0, 1), value=IGNORED)


def linear_cross_entropy(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.1,
    chunk: int = 256,
) -> torch.Tensor:
    """Mean cross-entropy of `linear(states, weight, bias)` over the rows with a target, without keeping any logits.

    A vocabulary's logits are by far the widest tensor of a step. Here a chunk of rows is computed at a time, together with
    its gradient, in the dtype of autocast and with the softmax in fp32. Has first derivatives only.

    Args:
        states: [N, D].
        weight: [V, D].
        bias: [V].
        targets: int64[N], IGNORED (-100) in rows without one.
        label_smoothing: BLIP-2's 0.1.
        chunk: rows at a time. With BERT's vocabulary 256 of them are 31 MB, which an allocator still reuses.
    """
    return _LinearCrossEntropy.apply(states, weight, bias, targets, label_smoothing, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, targets, label_smoothing, chunk):
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        kept, low = targets != IGNORED, weight.to(dtype)
        rows = (kept / kept.sum().clamp(min=1)).unsqueeze(1)  # the weight of each row in the mean
        loss = states.new_zeros((), dtype=torch.float32)
        of_states, of_weight, of_bias = torch.empty_like(states), torch.zeros_like(weight), torch.zeros_like(bias)
        with torch.autocast(device, enabled=False):
            for at in range(0, len(states), chunk):
                some, share = states[at : at + chunk].to(dtype), rows[at : at + chunk]
                target = targets[at : at + chunk].clamp(min=0).unsqueeze(1)
                logits = linear(some, low, bias.to(dtype)).float()
                normaliser = logits.logsumexp(1, keepdim=True)
                truth = (1 - label_smoothing) * logits.gather(1, target)
                loss += (share * (normaliser - truth - label_smoothing * logits.mean(1, keepdim=True))).sum()
                gradient = logits.sub_(normaliser).exp_().sub_(label_smoothing / weight.shape[0])
                gradient.scatter_add_(1, target, torch.full_like(truth, label_smoothing - 1)).mul_(share)
                of_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                of_states[at : at + chunk] = gradient @ low
                of_weight += gradient.t() @ some
        ctx.save_for_backward(of_states, of_weight, of_bias)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        of_states, of_weight, of_bias = ctx.saved_tensors
        return gradient * of_states, gradient * of_weight, gradient * of_bias, None, None, None


__all__ = [
    "image_text_similarity",
    "itc_loss",
    "itg_targets",
    "itm_loss",
    "linear_cross_entropy",
    "sample_hard_negatives",
]
