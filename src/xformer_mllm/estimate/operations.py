"""The cost of an operation: FLOPs of its matrix products and bytes kept for the backward pass, from its shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import Blip2QFormerConfig

BF16, FP32, INT64 = 2, 4, 8  # bytes
NORM_STATISTICS = 2 * FP32  # mean and deviation of each token


@dataclass(frozen=True)
class Cost:
    """FLOPs of the matrix products, forward and backward, and bytes kept for the backward pass."""

    forward: int = 0
    backward: int = 0
    kept: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward, self.kept + other.kept)

    def __mul__(self, times: int) -> "Cost":
        return Cost(times * self.forward, times * self.backward, times * self.kept)


def total(costs: Sequence[Cost]) -> Cost:
    return sum(costs, Cost())


def linear(tokens: int, inside: int, outside: int) -> Cost:
    """A trained one: gradients of its input and of its weight; keeps its input in bf16, a copy where that came in fp32."""
    flops = 2 * tokens * inside * outside
    return Cost(flops, 2 * flops, BF16 * tokens * inside)


def attention(asking: int, answering: int, width: int, heads: int, masked: bool = False) -> Cost:
    """Queries on keys, weights on values; keeps queries, keys, values, a number per row, and a mask where there is one.

    Its output is kept by the linear layer behind it.
    """
    flops = 4 * asking * answering * width
    mask = BF16 * asking * answering if masked else 0
    return Cost(flops, 2 * flops, BF16 * width * (asking + 2 * answering) + FP32 * heads * asking + mask)


def norm(tokens: int, width: int) -> Cost:
    """Computed in fp32; keeps its input."""
    return Cost(kept=tokens * (FP32 * width + NORM_STATISTICS))


def dropout(tokens: int, width: int, config: Blip2QFormerConfig) -> Cost:
    """Keeps which numbers stayed, one byte each."""
    return Cost(kept=tokens * width if config.hidden_dropout_prob else 0)


def feed_forward(tokens: int, width: int, inside: int) -> Cost:
    """Two trained linear layers; GELU keeps its input."""
    return linear(tokens, width, inside) + Cost(kept=BF16 * tokens * inside) + linear(tokens, inside, width)


def frozen_tower(layers: int, weights: int, tokens: int, width: int) -> Cost:
    """Forward only: every token meets all weights of the stack, and all other tokens once in each layer."""
    return Cost(2 * tokens * weights + 4 * layers * tokens**2 * width)


def frozen_on_the_way(layers: int, weights: int, tokens: int, width: int, keys: int, heads: int, inside: int) -> Cost:
    """A frozen pre-norm stack that the gradient passes through: to its input alone, so no linear layer keeps anything.

    Each layer keeps what its two norms read (fp32), queries, keys, values and output of its attention, and the numbers
    of its feed-forward that the activation needs. `keys`: width of keys and of values. `inside`: see the callers.
    """
    forward = frozen_tower(layers, weights, tokens, width).forward
    attended = 4 * layers * tokens**2 * width  # a product of two activations has two gradients
    one_layer = norm(tokens, width) * 2 + Cost(
        kept=BF16 * tokens * (2 * width + 2 * keys + inside) + FP32 * heads * tokens
    )
    return Cost(forward, forward + attended, layers * one_layer.kept)
