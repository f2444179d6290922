"""The losses of stage 1 as pure functions of tensors (paper section "Stage 1"; LAVIS blip2_qformer.py).

`B` this process's batch, `G` the batch of all processes, `Q` queries, `T` text tokens, `V` vocabulary, `D` width.
Nothing is random but the hard negatives. All results are fp32. The reconstruction loss is in `reconstruction.py`.
"""

import torch
from torch.nn.functional import cross_entropy


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
    """Image-text matching: cross-entropy of [P, 2] logits, averaged over the queries; label 1 is a matching pair."""
    return cross_entropy(logits.float(), labels)


def itg_loss(logits: torch.Tensor, input_ids: torch.Tensor, text_mask: torch.Tensor, label_smoothing: float = 0.1):
    """Image-grounded text generation: predict each token from those before it.

    Args:
        logits: [B, T, V] at every text position.
        input_ids: int64[B, T], the input ([DEC] first).
        text_mask: [B, T], 1 = token; padding is not a target.
        label_smoothing: BLIP-2's 0.1.
    """
    targets = input_ids.masked_fill(~text_mask.bool(), -100)[:, 1:]
    return cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=label_smoothing
    )


__all__ = ["image_text_similarity", "itc_loss", "itg_loss", "itm_loss", "sample_hard_negatives"]
