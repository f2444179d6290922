"""Outputs of the X-Former models.

`B` batch, `Q` queries, `T` text tokens, `N` CLIP tokens, `L` MAE patches, `K` kept MAE patches, `D` width, `V` vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class XFormerModelOutput(ModelOutput):
    """Every stage of the figure.

    Args:
        clip_tokens: C after its trainable layer norm, [B, N, D_clip].
        mae_tokens: M, CLS first, [B, 1+K, D_mae]; None without a second encoder.
        queries: Z_q, [B, Q, D].
        fused_queries: Z', [B, Q, D].
        enriched_mae_tokens: M', [B, 1+K, D_mae].
        text_states: [B, T, D], if text was given, and unless only the queries are computed (`queries_only`).
        mae_mask: [B, L], 1 = masked.
        ids_restore: int64[B, L]; the order of M (see `vision_encoders.MaeTokens`).
        clip_attentions: a map [B, heads, Q, N] for each Q-Former layer that reads C, on request.
        mae_attentions: a map [B, heads, Q, 1+K] for each fusion block, on request.
        attentions: a map [B, heads, Q+T, Q+T] for each Q-Former layer, on request.
        hidden_states: [B, Q+T, D] before and after each Q-Former layer, on request.
    """

    clip_tokens: torch.Tensor | None = None
    mae_tokens: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    fused_queries: torch.Tensor | None = None
    enriched_mae_tokens: torch.Tensor | None = None
    text_states: torch.Tensor | None = None
    mae_mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    clip_attentions: tuple | None = None
    mae_attentions: tuple | None = None
    attentions: tuple | None = None
    hidden_states: tuple | None = None


@dataclass
class XFormerForPreTrainingOutput(ModelOutput):
    """`loss`: the weighted sum of the losses; accuracies in [0, 1]; `itm_logits` [3B, 2].

    `hidden_states` and `attentions` are the Q-Former's in the pass that generates, on request.
    """

    loss: torch.Tensor | None = None
    itc_loss: torch.Tensor | None = None
    itm_loss: torch.Tensor | None = None
    itg_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    itc_accuracy: torch.Tensor | None = None
    itm_accuracy: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    xformer_output: XFormerModelOutput | None = None


@dataclass
class XFormerForImageTextRetrievalOutput(ModelOutput):
    """`logits_per_image`: with ITC cosines [images, texts], with ITM [B, 2] (no pair, pair), a row for each pair.

    `hidden_states` and `attentions` are the Q-Former's, on request.
    """

    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    xformer_output: XFormerModelOutput | None = None


@dataclass
class XFormerForConditionalGenerationOutput(ModelOutput):
    """`loss`: `lm_loss`, plus `reconstruction_loss` in the variant that keeps it; `logits` [B, T, V].

    `hidden_states` and `attentions` are the language model's (of an encoder-decoder the decoder's), on request.
    """

    loss: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    xformer_output: XFormerModelOutput | None = None


@dataclass
class XFormerImageFeaturesOutput(BaseModelOutputWithPooling):
    """`last_hidden_state`: C, [B, N, D_clip]; `pooler_output`: soft prompts [texts, Q, E]; `xformer_output`: all stages."""

    xformer_output: XFormerModelOutput | None = None


__all__ = [
    "XFormerForConditionalGenerationOutput",
    "XFormerForImageTextRetrievalOutput",
    "XFormerForPreTrainingOutput",
    "XFormerImageFeaturesOutput",
    "XFormerModelOutput",
]
