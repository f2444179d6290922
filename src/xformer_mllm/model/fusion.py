"""How the MAE tokens reach the queries: the four ways that the paper compares, behind one interface.

A fusion determines what the Q-Former reads (`image_states`) and what happens to its output (`forward`):

    none                    Q-Former reads C                                    Z' = Z_q                  (BLIP-2)
    concat                  Q-Former reads [C; project(M)]                      Z' = Z_q
    early_cross_attention   Q-Former reads C, and M in the same layers          Z' = Z_q
    dual_cross_attention    Q-Former reads C;  M reads Z_q -> M';  Z_q reads M' -> Z'                    (X-Former)

New output projections start at zero, so a model made from a BLIP-2 checkpoint starts as that BLIP-2, with M' = M
(only concat changes the softmax from the first step).

`B` batch, `Q` queries, `N` CLIP tokens, `L` MAE tokens, `D` Q-Former width, `D_m` width of M.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import eager_attention_forward

from .configuration_xformer import XFormerConfig


class Fused(NamedTuple):
    """Z' [B, Q, D]; M' [B, L, D_m], None without a second encoder; each block's map of Z_q over M' [B, heads, Q, L]."""

    queries: torch.Tensor
    mae_tokens: torch.Tensor | None
    attentions: tuple[torch.Tensor, ...] = ()


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero (`XFormerPreTrainedModel._init_weights`), so its branch adds nothing at first."""


class CrossAttention(nn.Module):
    """Cross-attention of `x` to `context`, with pre-norm on both sides; the output projection starts at zero.

    Args:
        width: of `x` and of the attention.
        context_width: of `context`.
        heads: number of heads, a divisor of `width`.
        config: the Q-Former's, for layer-norm epsilon, attention dropout and attention implementation.
    """

    def __init__(self, width: int, context_width: int, heads: int, config: Blip2QFormerConfig):
        super().__init__()
        self.config = config
        self.head_dim = width // heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(context_width, eps=config.layer_norm_eps)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.output = ZeroLinear(width, width)

    def ask(self, x: torch.Tensor) -> torch.Tensor:
        """Project `x` [B, X, width] -> its queries, [B, X, width]."""
        return self.query(self.norm(x))

    def forward(self, asked: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries from `ask`, [B, Y, context_width] -> the residual for x, and the map [B, heads, X, Y] (eager only)."""
        context = self.context_norm(context)
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for states in (asked, self.key(context), self.value(context))
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        states, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        return self.output(states.flatten(2)), weights


class FeedForward(nn.Module):
    """Pre-norm, two layers, GELU; the second starts at zero."""

    def __init__(self, width: int, config: Blip2QFormerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(width, config.intermediate_size)
        self.output = ZeroLinear(config.intermediate_size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(nn.functional.gelu(self.intermediate(self.norm(x))))


class Fusion(nn.Module):
    """How M reaches the queries. By default it does not."""

    def image_states(self, clip_tokens: torch.Tensor, mae_tokens: torch.Tensor | None) -> torch.Tensor:
        """C [B, N, D_c] and M [B, L, D_m] -> what the Q-Former's cross-attentions read, [B, N', D_c]."""
        return clip_tokens

    def qformer_inputs(self, mae_tokens: torch.Tensor | None) -> dict:
        """Further keyword arguments of the Q-Former."""
        return {}

    def mae_norms(self) -> list[nn.Module]:
        """The layer norms that read M."""
        return []

    def mae_queries(self, mae_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """Project M's own queries, [B, L, D_m], for several calls of `forward`; None where M asks nothing."""
        return None

    def forward(
        self, queries: torch.Tensor, mae_tokens: torch.Tensor | None, mae_queries: torch.Tensor | None = None
    ) -> Fused:
        """Z_q [B, Q, D], M, and `mae_queries` if they are projected already -> Z' and M'."""
        return Fused(queries, mae_tokens)


class NoFusion(Fusion):
    """BLIP-2: the queries never see M."""


class Concatenation(Fusion):
    """The Q-Former's cross-attention reads [C; project(M)] (paper's ablation "concatenation", 110M trainable)."""

    def __init__(self, mae_width: int, clip_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(mae_width)
        self.project = nn.Linear(mae_width, clip_width)

    def mae_norms(self) -> list[nn.Module]:
        return [self.norm]

    def image_states(self, clip_tokens: torch.Tensor, mae_tokens: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([clip_tokens, self.project(self.norm(mae_tokens))], dim=1)


class EarlyCrossAttention(Fusion):
    """Every Q-Former layer that reads C then reads M as well (paper's ablation "early cross-attention").

    The Q-Former stays the library's own: a hook after each of its cross-attentions adds ours, whose weights are here.
    """

    def __init__(self, mae_width: int, qformer: Blip2QFormerModel):
        super().__init__()
        config = qformer.config
        reading = [layer.crossattention for layer in qformer.encoder.layer if layer.has_cross_attention]
        self.layers = nn.ModuleList(
            CrossAttention(config.hidden_size, mae_width, config.num_attention_heads, config) for _ in reading
        )
        for module, layer in zip(reading, self.layers, strict=True):
            # A partial, not a closure: a copy of the model then calls the copied layer.
            module.register_forward_hook(partial(_then_read_mae, layer), with_kwargs=True)

    def mae_norms(self) -> list[nn.Module]:
        return [part for name, part in self.named_modules() if name.endswith("context_norm")]

    def qformer_inputs(self, mae_tokens: torch.Tensor | None) -> dict:
        return {"mae_tokens": mae_tokens}


def _then_read_mae(layer: Any, _module, _args, kwargs, queries):
    return queries + layer(layer.ask(queries), kwargs["mae_tokens"])[0]


class DualCrossAttentionBlock(nn.Module):
    """M reads Z_q -> M', then Z_q reads M' -> Z' (paper section "Dual cross-attention"), with a feed-forward after each."""

    def __init__(self, mae_width: int, mae_heads: int, config: Blip2QFormerConfig):
        super().__init__()
        width = config.hidden_size
        self.mae_reads_queries = CrossAttention(mae_width, width, mae_heads, config)
        self.mae_feed_forward = FeedForward(mae_width, config)
        self.queries_read_mae = CrossAttention(width, mae_width, config.num_attention_heads, config)
        self.queries_feed_forward = FeedForward(width, config)

    def forward(self, queries: torch.Tensor, mae_tokens: torch.Tensor, mae_queries: torch.Tensor | None = None):
        """Z_q [B, Q, D], M [B, L, D_m] -> Z', M', the map [B, heads, Q, L] of the queries over M'."""
        if mae_queries is None:
            mae_queries = self.mae_reads_queries.ask(mae_tokens)
        mae_tokens = mae_tokens + self.mae_reads_queries(mae_queries, queries)[0]
        mae_tokens = mae_tokens + self.mae_feed_forward(mae_tokens)
        read, attention = self.queries_read_mae(self.queries_read_mae.ask(queries), mae_tokens)
        queries = queries + read
        queries = queries + self.queries_feed_forward(queries)
        return queries, mae_tokens, attention


class DualCrossAttention(Fusion):
    """X-Former: blocks of dual cross-attention on the Q-Former's output."""

    def __init__(self, mae_width: int, mae_heads: int, num_blocks: int, config: Blip2QFormerConfig):
        super().__init__()
        self.blocks = nn.ModuleList(DualCrossAttentionBlock(mae_width, mae_heads, config) for _ in range(num_blocks))

    def mae_norms(self) -> list[nn.Module]:
        reading = ("mae_reads_queries.norm", "mae_feed_forward.norm", "queries_read_mae.context_norm")
        return [part for name, part in self.named_modules() if name.endswith(reading)]

    def mae_queries(self, mae_tokens: torch.Tensor | None) -> torch.Tensor | None:
        return self.blocks[0].mae_reads_queries.ask(mae_tokens)  # type: ignore[operator, union-attr]

    def forward(
        self, queries: torch.Tensor, mae_tokens: torch.Tensor | None, mae_queries: torch.Tensor | None = None
    ) -> Fused:
        attentions = []
        for block in self.blocks:
            queries, mae_tokens, attention = block(queries, mae_tokens, mae_queries)
            attentions.append(attention)
            mae_queries = None  # the next block's M is another
        return Fused(queries, mae_tokens, tuple(attentions))


def build_fusion(config: XFormerConfig, qformer: Blip2QFormerModel) -> Fusion:
    """Build the fusion that the configuration names."""
    if config.fusion == "none":
        return NoFusion()
    source = config.second_encoder_config
    if config.fusion == "concat":
        return Concatenation(source.hidden_size, config.clip_config.hidden_size)
    if config.fusion == "early_cross_attention":
        return EarlyCrossAttention(source.hidden_size, qformer)
    return DualCrossAttention(source.hidden_size, source.num_attention_heads, config.fusion_blocks, qformer.config)


__all__ = ["Fused", "ZeroLinear", "build_fusion"]
