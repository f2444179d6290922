"""The Q-Former: transformers' own, without what a step would compute twice or for nothing.

A step reads the same image up to four times: alone or with the text it generates, and in three image-text pairs. Its keys
and values depend on no text, so the cross-attentions can take them projected once. And where only the first positions of
the output are used (the queries in ITM, [CLS] of a text), the last layer can compute those alone. Weights and their names
are transformers'.

`B` batch, `Q` queries, `T` all positions, `N` image tokens, `D` width.
"""

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerAttention,
    Blip2QFormerMultiHeadAttention,
    eager_attention_forward,
)

KeysValues = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Keys and values [B, N, D] of each layer that reads the image."""


class ImageAttention(Blip2QFormerMultiHeadAttention):
    """The queries' attention to an image: `index` is its place among those of the Q-Former."""

    def __init__(self, attention: Blip2QFormerMultiHeadAttention, index: int):
        with torch.device("meta"):
            super().__init__(attention.config, is_cross_attention=True)
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.index = index

    def project(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project image tokens [B, N, width] -> keys and values, [B, N, D] each."""
        return self.key(states), self.value(states)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        keys_values: KeysValues | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As transformers' forward, on `keys_values` if given: [B, Q, D] -> [B, Q, D], and the map (eager only)."""
        if keys_values is None:
            assert encoder_hidden_states is not None  # the layer checks it
            key, value = self.project(encoder_hidden_states)
        else:
            key, value = keys_values[self.index]
        query, key, value = (
            states.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for states in (self.query(hidden_states), key, value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        states, weights = attend(
            self, query, key, value, encoder_attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return states.flatten(2), weights


class LastSelfAttention(Blip2QFormerAttention):
    """The last layer's self-attention, and through it the last layer, for the first positions only."""

    def __init__(self, attention: Blip2QFormerAttention):
        nn.Module.__init__(self)
        self.attention, self.output = attention.attention, attention.output

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        kept: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """As transformers' forward, [B, T, D] -> [B, T, D], or [B, kept, D]; all positions are attended to."""
        if kept is None or not (attention_mask is None or torch.is_tensor(attention_mask)):  # flex attention's mask
            return super().forward(hidden_states, attention_mask, **kwargs)
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :kept]
        asking = hidden_states[:, :kept]
        states, _ = self.attention(
            asking, encoder_hidden_states=hidden_states, encoder_attention_mask=attention_mask, **kwargs
        )
        return self.output(states, asking)


def build_qformer(config: Blip2QFormerConfig) -> Blip2QFormerModel:
    """Build transformers' Q-Former, whose forward also takes `keys_values` from `project_image`, and `kept`.

    kept: how many of the first positions to return, all by default; not more than there are queries.
    """
    qformer = Blip2QFormerModel._from_config(config)
    reading = [layer.crossattention for layer in qformer.encoder.layer if layer.has_cross_attention]
    for index, module in enumerate(reading):
        module.attention = ImageAttention(module.attention, index)
    last = qformer.encoder.layer[-1]
    last.attention = LastSelfAttention(last.attention)
    return qformer


def project_image(qformer: Blip2QFormerModel, states: torch.Tensor) -> KeysValues:
    """Project what the Q-Former reads of images, [B, N, width], for each of its layers that reads them."""
    states = states.to(qformer.layernorm.weight.dtype)  # trained in fp32
    layers = qformer.encoder.layer
    return tuple(layer.crossattention.attention.project(states) for layer in layers if layer.has_cross_attention)


__all__ = ["KeysValues", "build_qformer", "project_image"]
