"""The three attention masks of stage 1 (paper section "Stage 1"; BLIP-2 figure 2), as 4-D boolean masks.

Rows attend to columns; `Q` are the learned queries, `T` the text; `#` is visible, `.` is not.

    unimodal (ITC)        multimodal causal (ITG)      bidirectional (ITM)
         Q Q T T T             Q Q T T T                    Q Q T T T
      Q  # # . . .          Q  # # . . .                 Q  # # # # #
      Q  # # . . .          Q  # # . . .                 Q  # # # # #
      T  . . # # #          T  # # # . .                 T  # # # # #
      T  . . # # #          T  # # # # .                 T  # # # # #
      T  . . # # #          T  # # # # #                 T  # # # # #

Padding is never visible. `B` batch, `Q` queries, `T` text tokens.
"""

import torch


def _with_padding(allowed: torch.Tensor, text_mask: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Hide padding: bool[Q+T, Q+T] and the text's mask [B, T] -> bool[B, 1, Q+T, Q+T]."""
    seen = torch.nn.functional.pad(text_mask.bool(), (num_queries, 0), value=True)
    return allowed[None, None] & seen[:, None, None, :]


def unimodal_mask(text_mask: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Queries and text do not see each other (ITC). `text_mask`: [B, T], 1 = token -> bool[B, 1, Q+T, Q+T]."""
    is_text = torch.arange(num_queries + text_mask.shape[1], device=text_mask.device) >= num_queries
    return _with_padding(is_text[:, None] == is_text[None, :], text_mask, num_queries)


def multimodal_causal_mask(text_mask: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Queries see queries; a text token sees all queries and the text up to itself (ITG). Shapes as above."""
    position = torch.arange(num_queries + text_mask.shape[1], device=text_mask.device)
    is_query = position < num_queries
    allowed = is_query[None, :] | (~is_query[:, None] & (position[:, None] >= position[None, :]))
    return _with_padding(allowed, text_mask, num_queries)


def bidirectional_mask(text_mask: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Everything sees everything (ITM). Shapes as above."""
    length = num_queries + text_mask.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=text_mask.device)
    return _with_padding(allowed, text_mask, num_queries)


def to_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a bool mask to 0 where visible and the dtype's minimum elsewhere, which eager and sdpa attention accept."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


__all__ = ["bidirectional_mask", "multimodal_causal_mask", "to_additive", "unimodal_mask"]
