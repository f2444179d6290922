"""FLOPs and bytes of operations and of the parts of a pass; memory and time on a GPU computed from them."""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import Blip2QFormerConfig
from transformers.configuration_utils import PreTrainedConfig

from xformer_mllm.estimate.sizes import Sizes
from xformer_mllm.model.configuration_xformer import XFormerConfig

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


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def linear(tokens: int, inside: int, outside: int) -> Cost:
    """A trained linear layer with gradients of input and weight; keeps its input in bf16 (a copy if it was fp32)."""
    flops = 2 * tokens * inside * outside
    return Cost(flops, 2 * flops, BF16 * tokens * inside)


def attention(asking: int, answering: int, width: int, heads: int, masked: bool = False) -> Cost:
    """Both products of attention; keeps queries, keys, values, one number per row, and the mask if there is one.

    The output is kept by the following linear layer.
    """
    flops = 4 * asking * answering * width
    mask = BF16 * asking * answering if masked else 0
    return Cost(flops, 2 * flops, BF16 * width * (asking + 2 * answering) + FP32 * heads * asking + mask)


def norm(tokens: int, width: int) -> Cost:
    """A layer norm in fp32; keeps its input."""
    return Cost(kept=tokens * (FP32 * width + NORM_STATISTICS))


def dropout(tokens: int, width: int, config: Blip2QFormerConfig) -> Cost:
    """Dropout; keeps its mask, one byte per value."""
    return Cost(kept=tokens * width if config.hidden_dropout_prob else 0)


def feed_forward(tokens: int, width: int, inside: int) -> Cost:
    """Two trained linear layers with GELU between them, which keeps its input."""
    return linear(tokens, width, inside) + Cost(kept=BF16 * tokens * inside) + linear(tokens, inside, width)


def frozen_tower(layers: int, weights: int, tokens: int, width: int) -> Cost:
    """The forward pass of a frozen stack: each token times all weights, and times all tokens in each layer."""
    return Cost(2 * tokens * weights + 4 * layers * tokens**2 * width)


def frozen_stack(layers: int, weights: int, tokens: int, width: int, keys: int, heads: int, inside: int) -> Cost:
    """A frozen pre-norm stack with a gradient to its input only, so that its linear layers keep nothing.

    Each layer keeps the inputs of its two norms (fp32), queries, keys, values and output of its attention, and `inside`
    values per token of its feed-forward for the activation. `keys`: width of keys and of values.
    """
    forward = frozen_tower(layers, weights, tokens, width).forward
    attended = 4 * layers * tokens**2 * width  # a product of two activations has two gradients
    one_layer = norm(tokens, width) * 2 + Cost(
        kept=BF16 * tokens * (2 * width + 2 * keys + inside) + FP32 * heads * tokens
    )
    return Cost(forward, forward + attended, layers * one_layer.kept)


ADAMW_TRAFFIC = 7 * FP32  # reads weight, gradient and two moments, and writes all but the gradient


@dataclass(frozen=True)
class Gpu:
    """Data-sheet values: peak bf16 FLOP/s without sparsity, memory in bytes, bandwidth in bytes/s."""

    flops: float
    memory: float
    bandwidth: float


GPUS = {
    "A100-40": Gpu(312e12, 40e9, 1555e9),
    "A100-80": Gpu(312e12, 80e9, 2039e9),
    "H100": Gpu(989e12, 80e9, 3350e9),
    "H200": Gpu(989e12, 141e9, 4800e9),
    "L40S": Gpu(362e12, 48e9, 864e9),
    "RTX-4090": Gpu(165e12, 24e9, 1008e9),
}
"""GPUs with bf16; older ones (V100, T4) lack it."""


@dataclass(frozen=True)
class Work:
    """The work of one GPU in one pass, forward and backward. The last three fields apply to stage 2 only."""

    stage: int
    images: int
    """Batch size on this GPU."""
    text_tokens: int
    """T, of the caption in stage 1, of the target text in stage 2."""
    gpus: int = 1
    """Number of GPUs that share the contrastive loss."""
    texts: int = 1
    """Texts per image (several for questions)."""
    prompt_tokens: int = 1
    """Tokens before the target text, including the start token."""
    instruction_aware: bool = False
    """Whether the Q-Former reads the prompt."""


# ---- the parts


@dataclass(frozen=True)
class Tokens:
    """Per image: C, and M after masking. `mae_patches`: before masking."""

    clip: int
    mae: int
    mae_patches: int


def tokens_of(config: XFormerConfig, stage: int) -> Tokens:
    clip = _patches(config.clip_config, config.clip_config.image_size) + _class_token(config.clip_config)
    if config.mae_config is None:
        return Tokens(clip, clip if config.has_second_encoder else 0, 0)
    patches = _patches(config.mae_config, config.mae_image_size)
    masked = config.reconstruction if stage == 1 else config.reconstruction_in_stage2
    kept = int(patches * (1 - config.mask_ratio)) if masked else patches
    return Tokens(clip, kept + _class_token(config.mae_config), patches)


def _patches(tower: PreTrainedConfig, image_size: int) -> int:
    return (image_size // tower.patch_size) ** 2


def _class_token(tower: PreTrainedConfig) -> int:
    return 0 if "siglip" in tower.model_type else 1


def clip_encoder(config: XFormerConfig, sizes: Sizes, tokens: Tokens) -> Cost:
    """The whole image through the tower, and the trained layer norm after it."""
    clip = config.clip_config
    patches = 2 * _patches(clip, clip.image_size) * 3 * clip.patch_size**2 * clip.hidden_size
    tower = frozen_tower(*sizes.stacks["clip_encoder"], tokens.clip, clip.hidden_size)
    return Cost(patches) + tower + norm(tokens.clip, clip.hidden_size)


def second_encoder(config: XFormerConfig, sizes: Sizes, tokens: Tokens) -> Cost:
    """The unmasked patches through the tower; all patches are embedded."""
    tower = config.mae_config
    patches = 2 * tokens.mae_patches * 3 * tower.patch_size**2 * tower.hidden_size
    read = tokens.mae + getattr(tower, "num_register_tokens", 0)
    return Cost(patches) + frozen_tower(*sizes.stacks["mae_encoder"], read, tower.hidden_size)


def qformer(
    config: XFormerConfig, tokens: Tokens, queries: int, text: int, projected: bool = False, kept: int | None = None
) -> Cost:
    """One pass of `queries` and `text` together; either may be 0. Only queries read the image.

    projected: the image's keys and values are those of an earlier pass.
    kept: the positions that the last layer computes, if not all.
    """
    parts, width, heads = config.qformer_config, config.qformer_config.hidden_size, _heads(config)
    both = queries + text
    normed = both if text else 0  # queries alone are a view of a parameter
    cost = norm(normed, width) + dropout(both, width, parts)
    for number in range(parts.num_hidden_layers):
        last = number == parts.num_hidden_layers - 1
        asking = both if kept is None or not last else kept
        after = norm(asking, width) + dropout(asking, width, parts)
        cost += linear(asking, width, width) * 2 + linear(both, width, width) * 2
        cost += attention(asking, both, width, heads, masked=text > 0) + after
        cost += feed_forward(asking, width, parts.intermediate_size) + after
    reads = _read_by_qformer(config, tokens)
    cross = linear(queries, width, width) * 2 + attention(queries, reads, width, heads)
    cross += norm(queries, width) + dropout(queries, width, parts)
    if queries:
        cost += cross * _crossing(config) + (Cost() if projected else keys_and_values(config, tokens))
    return cost


def keys_and_values(config: XFormerConfig, tokens: Tokens) -> Cost:
    """What the Q-Former's layers read of an image, projected."""
    parts = config.qformer_config
    one = linear(_read_by_qformer(config, tokens), parts.encoder_hidden_size, parts.hidden_size)
    return one * 2 * _crossing(config)


def _read_by_qformer(config: XFormerConfig, tokens: Tokens) -> int:
    return tokens.clip + (tokens.mae if config.fusion == "concat" else 0)


def _crossing(config: XFormerConfig) -> int:
    """The number of layers that read the image."""
    return len(range(0, config.qformer_config.num_hidden_layers, config.qformer_config.cross_attention_frequency))


def fusion(config: XFormerConfig, tokens: Tokens, queries: int) -> Cost:
    """The variant's addition to one pass of the Q-Former with queries, without `fusion_of_image`."""
    if config.fusion in ("none", "concat"):
        return Cost()
    parts, width, wide = config.qformer_config, config.qformer_config.hidden_size, _mae_width(config)
    inside, heads = parts.intermediate_size, _heads(config)
    if config.fusion == "early_cross_attention":
        statistics = Cost(kept=_crossing(config) * tokens.mae * NORM_STATISTICS)  # all layers read the same M
        layer = norm(queries, width) + linear(queries, width, width) + _reads(queries, width, tokens.mae, wide, heads)
        return layer * _crossing(config) + Cost(kept=FP32 * tokens.mae * wide) + statistics
    block = norm(queries, width) + _reads(
        tokens.mae, wide, queries, width, config.second_encoder_config.num_attention_heads
    )
    block += norm(tokens.mae, wide) + feed_forward(tokens.mae, wide, inside)
    block += norm(tokens.mae, wide) + linear(queries, width, width)  # queries are already kept
    block += _reads(queries, width, tokens.mae, wide, heads)
    block += norm(queries, width) + feed_forward(queries, width, inside)
    return block * config.fusion_blocks + _asks(config, tokens) * (config.fusion_blocks - 1)


def fusion_of_image(config: XFormerConfig, tokens: Tokens) -> Cost:
    """What the variant's addition computes of an image alone: in a dual cross-attention, the first block's queries of M."""
    if config.fusion == "concat":
        wide = _mae_width(config)
        return norm(tokens.mae, wide) + linear(tokens.mae, wide, config.clip_config.hidden_size)
    return _asks(config, tokens) if config.fusion == "dual_cross_attention" else Cost()


def _asks(config: XFormerConfig, tokens: Tokens) -> Cost:
    return norm(tokens.mae, _mae_width(config)) + linear(tokens.mae, _mae_width(config), _mae_width(config))


def _reads(asking: int, width: int, answering: int, context: int, heads: int) -> Cost:
    """The fusion's cross-attention after its norms and the projection of its queries."""
    products = linear(asking, width, width) + linear(answering, context, width) * 2
    return products + attention(asking, answering, width, heads)


def _heads(config: XFormerConfig) -> int:
    return config.qformer_config.num_attention_heads


def _mae_width(config: XFormerConfig) -> int:
    return config.second_encoder_config.hidden_size


def reconstruction(config: XFormerConfig, sizes: Sizes, tokens: Tokens) -> Cost:
    """M' through the frozen decoder, as all patches and CLS, and the squared error in fp32."""
    mae = config.mae_config
    width, length, values = mae.decoder_hidden_size, tokens.mae_patches + 1, 3 * mae.patch_size**2
    ends = 2 * tokens.mae * _mae_width(config) * width + 2 * length * width * values
    unshuffled = Cost(kept=INT64 * tokens.mae_patches * width)
    heads, inside = mae.decoder_num_attention_heads, mae.decoder_intermediate_size
    stack = frozen_stack(*sizes.stacks["mae_decoder"], length, width, width, heads, inside)
    error = Cost(kept=FP32 * tokens.mae_patches * values)
    return Cost(ends, ends) + unshuffled + stack + norm(length, width) + error


def stage1_heads(config: XFormerConfig, work: Work) -> Cost:
    """ITC against the pairs of all GPUs, ITM on three pairs, ITG on each text token but the first.

    ITG's cross-entropy computes its gradients in the forward pass and keeps those of the states.
    """
    width, shared = config.qformer_config.hidden_size, config.image_text_hidden_size
    queries, vocabulary = config.num_query_tokens, config.qformer_config.vocab_size
    pairs = work.images * work.gpus
    itc = linear(queries, width, shared) + linear(1, width, shared)
    compared = 4 * queries * shared * pairs  # each way: all queries of an image, or of all images, and one text
    itc += Cost(compared, 2 * compared, 2 * pairs * queries * BF16 + 3 * (queries + 1) * shared * FP32)
    itm = linear(3 * queries, width, 2)
    targets = work.text_tokens - 1
    itg = linear(targets, width, width) + Cost(kept=BF16 * targets * width) + norm(targets, width)
    itg += Cost(3 * 2 * targets * width * vocabulary, kept=FP32 * targets * width)
    return itc + itm + itg


def language_model(config: XFormerConfig, sizes: Sizes, work: Work) -> Cost:
    """One text: queries, prompt and target through the frozen stack; logits of the target only."""
    text = config.text_config
    length = config.num_query_tokens + work.prompt_tokens + work.text_tokens
    width, heads = text.hidden_size, text.num_attention_heads
    keys = width // heads * (getattr(text, "num_key_value_heads", None) or heads)
    inside = getattr(text, "ffn_dim", None) or text.intermediate_size
    # ReLU keeps its output; a gated feed-forward keeps the gate's input and output and the other factor.
    kept_inside = 3 * inside if sizes.gated else inside
    stack = frozen_stack(*sizes.stacks["language_model"], length, width, keys, heads, kept_inside)
    words = 2 * work.text_tokens * width * text.vocab_size
    return stack + norm(length, width) + Cost(words, words, FP32 * work.text_tokens * text.vocab_size)


def costs(config: XFormerConfig, sizes: Sizes, work: Work) -> dict[str, Cost]:
    """Cost per image of each part, in the order of the paper's figure."""
    tokens, queries, text = tokens_of(config, work.stage), config.num_query_tokens, work.text_tokens
    parts = {"CLIP encoder": clip_encoder(config, sizes, tokens)}
    if config.mae_config is not None:
        parts["second encoder"] = second_encoder(config, sizes, tokens)
    if work.stage == 1:
        parts["Q-Former, queries | text (ITG, ITC)"] = qformer(config, tokens, queries, text)
        parts["Q-Former, text (ITC)"] = qformer(config, tokens, 0, text, kept=1)
        parts["Q-Former, 3 pairs (ITM)"] = qformer(config, tokens, queries, text, projected=True, kept=queries) * 3
        parts["fusion, once and 3 pairs"] = fusion(config, tokens, queries) * 4 + fusion_of_image(config, tokens)
        if work.gpus > 1:  # negative images are another process's
            normed = norm(tokens.clip, config.clip_config.hidden_size)
            projected = keys_and_values(config, tokens) + fusion_of_image(config, tokens)
            parts["projections of negative images"] = normed + projected
        parts["heads of ITC, ITM, ITG"] = stage1_heads(config, work)
        if config.reconstruction:
            parts["MAE decoder"] = reconstruction(config, sizes, tokens)
        return parts
    read = work.prompt_tokens if work.instruction_aware else 0
    passes = work.texts if work.instruction_aware else 1
    parts["Q-Former"] = qformer(config, tokens, queries, read, kept=queries if read else None) * passes
    parts["fusion"] = (fusion(config, tokens, queries) + fusion_of_image(config, tokens)) * passes
    parts["projection"] = linear(queries, config.qformer_config.hidden_size, config.text_config.hidden_size) * passes
    if config.reconstruction_in_stage2:
        parts["MAE decoder"] = reconstruction(config, sizes, tokens) * passes
    parts["language model"] = language_model(config, sizes, work) * work.texts
    return parts


# ---- memory and time


def memory(config: XFormerConfig, sizes: Sizes, work: Work) -> dict[str, int]:
    """Bytes on each GPU at the end of a forward pass, by purpose.

    Gradients are included, although most are allocated while activations are freed.
    """
    trained = sum(sizes.trained.values())
    return {
        "frozen weights (bf16)": BF16 * (sum(sizes.parameters.values()) - trained),
        "trained weights (fp32)": FP32 * trained,
        "gradients (fp32)": FP32 * trained,
        "gradient buckets of DDP (fp32)": FP32 * trained if work.gpus > 1 else 0,
        "AdamW's two moments (fp32)": 2 * FP32 * trained,
        "bf16 copies of trained weights": BF16 * sizes.cast,
        "gradient of ITG's vocabulary (fp32)": FP32 * vocabulary_gradient(config) if work.stage == 1 else 0,
        "kept for the backward pass": work.images * total(costs(config, sizes, work).values()).kept,
        "images to choose hard negatives from": _candidates(config, work) if work.stage == 1 else 0,
    }


def vocabulary_gradient(config: XFormerConfig) -> int:
    """Values of ITG's weight and bias, whose gradients the forward pass keeps, once for all images."""
    return config.qformer_config.vocab_size * (config.qformer_config.hidden_size + 1)


def _candidates(config: XFormerConfig, work: Work) -> int:
    """The frozen encoders' outputs (bf16) for the images of all GPUs; C (fp32) and M (bf16) of the three pairs of each."""
    tokens = tokens_of(config, 1)
    clip = tokens.clip * config.clip_config.hidden_size
    mae = tokens.mae * _mae_width(config) if tokens.mae else 0
    everywhere = work.images * work.gpus if work.gpus > 1 else 0
    return everywhere * BF16 * (clip + mae) + 3 * work.images * (FP32 * clip + BF16 * mae)


def step_seconds(
    config: XFormerConfig, sizes: Sizes, work: Work, gpu: Gpu, utilisation: float, passes: int = 1
) -> float:
    """Seconds of an optimiser step of `passes` passes: matrix products at a share of the peak, traffic at the bandwidth.

    What is kept for the backward pass is written once and read once.
    """
    of_image = total(costs(config, sizes, work).values())
    flops = work.images * (of_image.forward + of_image.backward)
    moved = 2 * work.images * of_image.kept
    update = ADAMW_TRAFFIC * sum(sizes.trained.values())
    return passes * (flops / (utilisation * gpu.flops) + moved / gpu.bandwidth) + update / gpu.bandwidth
