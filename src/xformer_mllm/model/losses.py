"""The losses of stage 1 as pure functions of tensors (paper section "Stage 1"; LAVIS blip2_qformer.py).

`B` this process's batch, `G` the batch of all processes, `Q` queries, `T` text tokens, `V` vocabulary, `D` width.
Everything random can be handed in. All results are fp32. The reconstruction loss is in `reconstruction.py`.
"""

import torch
from torch.nn.functional import cross_entropy


def image_text_similarity(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Cosine of every image's best query with every text: [B, Q, D], [G, D], both of length 1 -> fp32 [B, G]."""
    with torch.autocast(image_features.device.type, enabled=False):  # it would multiply in bf16 whatever it is given
        return torch.einsum("bqd,gd->bgq", image_features.float(), text_features.float()).amax(-1)


def itc_loss(
    image_to_text: torch.Tensor, text_to_image: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.1
) -> torch.Tensor:
    """Image-text contrast: the mean of both directions' cross-entropies.

    Args:
        image_to_text: similarities divided by the temperature, [B, G].
        text_to_image: the same from the texts' side, [B, G].
        targets: int64[B], the column of each row's own pair.
        label_smoothing: BLIP-2's 0.1.
    """
    return (
        cross_entropy(image_to_text, targets, label_smoothing=label_smoothing)
        + cross_entropy(text_to_image, targets, label_smoothing=label_smoothing)
    ) / 2


def sample_hard_negatives(similarity: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """For each row a column that is no pair of it, drawn by softmax of the similarity (multinomial, LAVIS).

    Args:
        similarity: divided by the temperature, [B, G].
        excluded: bool[B, G], true for the own pair, and for pairs with the same text, which would be no negatives.

    Returns:
        int64[B]. A row in which all is excluded has no negative: there -1.
    """
    weights = similarity.detach().float().masked_fill(excluded, -torch.inf).softmax(-1).nan_to_num()
    # A row without weights (nothing left, or similarities that are not numbers) must not stop multinomial: the loss will
    # say nan, and the trainer where.
    weights = weights.masked_fill(weights.sum(-1, keepdim=True) == 0, 1.0)
    return torch.multinomial(weights, 1).squeeze(1).masked_fill(excluded.all(-1), -1)


def itm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Image-text matching: cross-entropy of [P, 2] logits, averaged over the queries, against 1 = a pair, 0 = none."""
    return cross_entropy(logits.float(), labels)


def itg_loss(logits: torch.Tensor, input_ids: torch.Tensor, text_mask: torch.Tensor, label_smoothing: float = 0.1):
    """Image-grounded text generation: each token from those before it.

    Args:
        logits: [B, T, V] at every text position.
        input_ids: int64[B, T], what was fed ([DEC] first).
        text_mask: [B, T], 1 = token; padding is no target.
        label_smoothing: BLIP-2's 0.1.
    """
    targets = input_ids.masked_fill(~text_mask.bool(), -100)[:, 1:]
    return cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=label_smoothing
    )


__all__ = ["image_text_similarity", "itc_loss", "itg_loss", "itm_loss", "sample_hard_negatives"]
