"""The Q-Former: transformers' own, whose cross-attentions can take an image's keys and values projected once.

A step reads the same image up to four times: alone or with the text it generates, and in three image-text pairs. Its keys
and values depend on no text. Weights and their names are transformers'.

`B` batch, `Q` queries, `N` image tokens, `D` width.
"""

import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention, eager_attention_forward

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


def build_qformer(config: Blip2QFormerConfig) -> Blip2QFormerModel:
    """Build transformers' Q-Former, whose forward also takes `keys_values` from `project_image`."""
    qformer = Blip2QFormerModel._from_config(config)
    reading = [layer.crossattention for layer in qformer.encoder.layer if layer.has_cross_attention]
    for index, module in enumerate(reading):
        module.attention = ImageAttention(module.attention, index)
    return qformer


def project_image(qformer: Blip2QFormerModel, states: torch.Tensor) -> KeysValues:
    """Project what the Q-Former reads of images, [B, N, width], for each of its layers that reads them."""
    states = states.to(qformer.layernorm.weight.dtype)  # trained in fp32
    layers = qformer.encoder.layer
    return tuple(layer.crossattention.attention.project(states) for layer in layers if layer.has_cross_attention)


__all__ = ["KeysValues", "build_qformer", "project_image"]
