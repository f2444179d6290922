"""`xformer estimate RECIPE`: what a training run costs, before any GPU is asked for.

Three things are told apart by how they are known:

    parameters     counted on the model itself, built on the meta device: exact
    FLOPs, bytes   arithmetic on the shapes, part by part, below: FLOPs of the matrix products are exact, bytes kept for
                   the backward pass within a per cent of what autograd saves (tests/test_estimate.py holds both)
    seconds        an assumption: matrix products reach a share of the GPU's peak (--utilisation), and what is kept for the
                   backward pass is written and read at the memory's bandwidth

All are those of bf16 autocast on a GPU: frozen parts in bf16, trained ones in fp32, layer norms in fp32, attention by a
kernel that keeps no map. A cost is that of one picture unless it says otherwise; MB and GB are 10^6 and 10^9 bytes.

`D` width, `Q` queries, `T` text tokens, `N` CLIP tokens, `L` tokens of M.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn
from transformers import AutoConfig, Blip2QFormerConfig, OPTConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.initialization import no_init_weights

from xformer_mllm.data.json_files import read_json
from xformer_mllm.language_models import language_model_dir
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import (
    XFormerForConditionalGeneration,
    XFormerForPreTraining,
    XFormerPreTrainedModel,
)
from xformer_mllm.variants import VARIANTS, variant_config

BF16, FP32, INT64 = 2, 4, 8  # bytes
MOST_PICTURES = 2**20  # a larger batch is not looked for
NORM_STATISTICS = 2 * FP32  # mean and deviation of each token
ADAMW_TRAFFIC = (
    7 * FP32
)  # a parameter's update reads it, its gradient and two moments, and writes all but the gradient


@dataclass(frozen=True)
class Gpu:
    """Of the maker's data sheet: peak bf16 FLOP/s without sparsity, memory in bytes, its bandwidth in bytes/s."""

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
"""GPUs with bf16; older ones (V100, T4) do not have it."""

OPT_SIZES = {"facebook/opt-2.7b": (2560, 32, 32), "facebook/opt-6.7b": (4096, 32, 32)}  # width, layers, heads


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """FLOPs, memory and time of a training run, from its recipe.

    Counted from the shapes; the time rests on an assumed utilisation of the GPU. Captions count at their greatest length
    (max_text_tokens), so real ones cost less.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """A file that `xformer train stage1|stage2 --config` takes: one of recipes/, or the config.json of a run."""
    gpu: str = "H100"
    """A100-40, A100-80, H100, H200, L40S or RTX-4090."""
    count: int = 8
    """How many of them, each with the recipe's batch_size."""
    utilisation: float = 0.4
    """Assumed share of the peak that the matrix products reach."""
    reserve: float = 0.1
    """Assumed share on top of the counted memory, for the allocator and the libraries."""
    batch_size: int | None = None
    """In place of the recipe's."""
    epoch: int = 14_000_000
    """Pictures of an epoch, where the recipe has no train_size: those of the paper."""
    variant: str | None = None
    """In place of the recipe's (stage 2: that of its stage-1 model)."""
    model: Path | None = None
    """Folder of a model whose sizes are meant (a stage-1 run's model/, or what convert wrote); none: the paper's sizes."""
    compare: bool = False
    """Also a line for each variant at the same settings, as ratios to qformer."""
    json: bool = False
    """Print JSON, for programs."""

    def __post_init__(self) -> None:
        """Raises ValueError, in one line, for what cannot be."""
        if self.gpu not in GPUS:
            raise ValueError(f"gpu '{self.gpu}' is unknown; choose one of {', '.join(GPUS)}")
        if min(self.count, self.epoch, 1 if self.batch_size is None else self.batch_size) < 1:
            raise ValueError("count, epoch and batch_size must be at least 1")
        if not 0 < self.utilisation <= 1 or self.reserve < 0:
            raise ValueError("utilisation must be above 0 and at most 1, reserve not negative")


# ---- what is trained on: the recipe


@dataclass(frozen=True)
class Work:
    """What one GPU does in one pass, forward and backward.

    Args:
        stage: 1 or 2.
        pictures: the batch on this GPU.
        text_tokens: T; of a caption in stage 1, of what is learned to be said in stage 2.
        gpus: how many share the contrastive loss.
        texts: for each picture, in stage 2 (several where it learns from questions).
        prompt_tokens: in front of what is learned, start token included, in stage 2.
        instruction_aware: the Q-Former reads the prompt, in stage 2.
    """

    stage: int
    pictures: int
    text_tokens: int
    gpus: int = 1
    texts: int = 1
    prompt_tokens: int = 1
    instruction_aware: bool = False


RECIPE_FIELDS = ("steps", "batch_size", "gradient_accumulation_steps", "max_text_tokens")


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a recipe. Raises FileNotFoundError, or ValueError if it is not the whole of a run's settings."""
    recipe = read_json(path)
    if not isinstance(recipe, dict) or recipe.get("command") not in ("train stage1", "train stage2"):
        raise ValueError(f'{path}: not a recipe of `xformer train stage1|stage2`: it has no such "command"')
    if missing := [name for name in RECIPE_FIELDS if not isinstance(recipe.get(name), int)]:
        raise ValueError(
            f"{path}: the estimate needs the number {missing[0]!r}; the config.json of a run has them all"
        )
    if recipe["command"] == "train stage2" and not isinstance(recipe.get("llm"), str):
        raise ValueError(f"{path}: the estimate needs the name of the language model, 'llm'")
    return recipe


def work_of(recipe: dict[str, Any], batch_size: int, gpus: int) -> Work:
    """What a recipe asks of each of `gpus`."""
    tokens = recipe["max_text_tokens"]
    if recipe["command"] == "train stage1":
        return Work(1, batch_size, tokens, gpus)
    if recipe.get("text", "captions") == "captions":
        return Work(2, batch_size, tokens, gpus)
    aware, texts = recipe.get("instruction_aware", True), recipe.get("questions_per_picture", 1)
    return Work(2, batch_size, tokens, gpus, texts, 1 + tokens, aware)


def model_config(recipe: dict[str, Any], variant: str | None, model: Path | None) -> XFormerConfig:
    """The sizes: the paper's or those of a model's folder, in the recipe's variant, with its language model in stage 2.

    Raises OSError or ValueError where a folder or a language model cannot be read.
    """
    if model is not None and not (model / "config.json").is_file():
        raise FileNotFoundError(f"{model}: no model there (no config.json in it)")
    base = XFormerConfig.paper() if model is None else XFormerConfig.from_pretrained(model)
    config = variant_config(variant or recipe.get("variant") or "xformer", base)
    if recipe["command"] == "train stage2":
        config.text_config = language_model_config(recipe["llm"])
        aware = recipe.get("text") == "questions" and recipe.get("instruction_aware", True)
        config.qformer_config.use_qformer_text_input = config.instruction_aware = aware
    return config


def language_model_config(name: str) -> PreTrainedConfig:
    """The two of the paper are known without the hub."""
    if name in OPT_SIZES:
        width, layers, heads = OPT_SIZES[name]
        return OPTConfig(
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
    config = AutoConfig.from_pretrained(language_model_dir(name))
    if config.is_encoder_decoder:
        raise ValueError(f"{name}: an encoder-decoder; the cost of causal language models alone is counted")
    return config


# ---- what is counted on the model itself


@dataclass(frozen=True)
class Sizes:
    """Read off a model on the meta device.

    parameters, trained: of each part (the children of the base, and those beside it).
    stacks: of each frozen tower, its number of layers and the weights of their linear layers, which every token meets.
    gated: whether the language model's feed-forward has a gate (Llama's kind).
    cast: trained weights that autocast copies to bf16: those of linear layers, and the words that ITG's head is tied to.
    """

    parameters: dict[str, int]
    trained: dict[str, int]
    stacks: dict[str, tuple[int, int]]
    gated: bool
    cast: int


def empty_model(config: XFormerConfig, stage: int) -> XFormerPreTrainedModel:
    """The model of a stage on the meta device, frozen as that stage freezes it."""
    kind = XFormerForPreTraining if stage == 1 else XFormerForConditionalGeneration
    with torch.device("meta"), no_init_weights():
        model = kind._from_config(config)
    model.tie_weights()
    model.freeze()
    return model


def sizes_of(model: Any) -> Sizes:
    parameters: dict[str, int] = {}
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.removeprefix("xformer.").split(".")[0]
        parameters[part] = parameters.get(part, 0) + parameter.numel()
        trained[part] = trained.get(part, 0) + parameter.numel() * parameter.requires_grad
    towers = {"clip_encoder": model.xformer.clip_encoder, "mae_encoder": model.xformer.mae_encoder}
    towers |= {"mae_decoder": model.xformer.mae_decoder, "language_model": getattr(model, "language_model", None)}
    gates = [name for name, _ in model.named_modules() if name.endswith("gate_proj")]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    cast = sum(m.weight.numel() for m in linear)
    if "itg_bias" in parameters:
        cast += model.xformer.embeddings.word_embeddings.weight.numel()
    return Sizes(
        parameters, trained, {name: _stack(tower) for name, tower in towers.items() if tower}, bool(gates), cast
    )


def _stack(tower: nn.Module) -> tuple[int, int]:
    layers = max((part for part in tower.modules() if isinstance(part, nn.ModuleList)), key=len)
    return len(layers), sum(part.weight.numel() for part in layers.modules() if isinstance(part, nn.Linear))


# ---- the cost of an operation


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


# ---- the parts


@dataclass(frozen=True)
class Tokens:
    """Of one picture: C, and M as it is read. `mae_patches`: before masking."""

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
    """The whole picture, and the trained layer norm behind the tower."""
    clip = config.clip_config
    patches = 2 * _patches(clip, clip.image_size) * 3 * clip.patch_size**2 * clip.hidden_size
    tower = frozen_tower(*sizes.stacks["clip_encoder"], tokens.clip, clip.hidden_size)
    return Cost(patches) + tower + norm(tokens.clip, clip.hidden_size)


def second_encoder(config: XFormerConfig, sizes: Sizes, tokens: Tokens) -> Cost:
    """The patches that are not masked (all are embedded)."""
    tower = config.mae_config
    patches = 2 * tokens.mae_patches * 3 * tower.patch_size**2 * tower.hidden_size
    read = tokens.mae + getattr(tower, "num_register_tokens", 0)
    return Cost(patches) + frozen_tower(*sizes.stacks["mae_encoder"], read, tower.hidden_size)


def qformer(config: XFormerConfig, tokens: Tokens, queries: int, text: int) -> Cost:
    """One pass of `queries` and `text` together; either may be 0. Text alone does not read the picture."""
    parts, width, heads = config.qformer_config, config.qformer_config.hidden_size, _heads(config)
    both = queries + text
    embedded = norm(both if text else 0, width) + dropout(both, width, parts)  # queries alone are a parameter's view
    reads = tokens.clip + (tokens.mae if config.fusion == "concat" else 0)
    after = norm(both, width) + dropout(both, width, parts)
    layer = linear(both, width, width) * 4 + attention(both, both, width, heads, masked=text > 0) + after
    layer += feed_forward(both, width, parts.intermediate_size) + after
    cross = linear(queries, width, width) * 2 + linear(reads, parts.encoder_hidden_size, width) * 2
    cross += attention(queries, reads, width, heads) + norm(queries, width) + dropout(queries, width, parts)
    crossing = len(range(0, parts.num_hidden_layers, parts.cross_attention_frequency)) if queries else 0
    return embedded + layer * parts.num_hidden_layers + cross * crossing


def fusion(config: XFormerConfig, tokens: Tokens, queries: int) -> Cost:
    """What the variant adds to one pass of the Q-Former with queries."""
    if config.fusion == "none":
        return Cost()
    parts, width, wide = config.qformer_config, config.qformer_config.hidden_size, _mae_width(config)
    inside, heads = parts.intermediate_size, _heads(config)
    if config.fusion == "concat":
        return norm(tokens.mae, wide) + linear(tokens.mae, wide, config.clip_config.hidden_size)
    if config.fusion == "early_cross_attention":
        crossing = len(range(0, parts.num_hidden_layers, parts.cross_attention_frequency))
        statistics = Cost(kept=crossing * tokens.mae * NORM_STATISTICS)  # all six read the same M
        layer = norm(queries, width) + _reads(queries, width, tokens.mae, wide, heads)
        return layer * crossing + Cost(kept=FP32 * tokens.mae * wide) + statistics
    mae_heads = config.second_encoder_config.num_attention_heads
    block = norm(tokens.mae, wide) + norm(queries, width) + _reads(tokens.mae, wide, queries, width, mae_heads)
    block += norm(tokens.mae, wide) + feed_forward(tokens.mae, wide, inside)
    block += norm(tokens.mae, wide) + _reads(queries, width, tokens.mae, wide, heads)  # its queries are kept already
    block += norm(queries, width) + feed_forward(queries, width, inside)
    return block * config.fusion_blocks


def _reads(asking: int, width: int, answering: int, context: int, heads: int) -> Cost:
    """The fusion's cross-attention behind its norms."""
    products = linear(asking, width, width) * 2 + linear(answering, context, width) * 2
    return products + attention(asking, answering, width, heads)


def _heads(config: XFormerConfig) -> int:
    return config.qformer_config.num_attention_heads


def _mae_width(config: XFormerConfig) -> int:
    return config.second_encoder_config.hidden_size


def reconstruction(config: XFormerConfig, sizes: Sizes, tokens: Tokens) -> Cost:
    """M' through the frozen decoder, all patches and CLS, and the squared error in fp32."""
    mae = config.mae_config
    width, length, values = mae.decoder_hidden_size, tokens.mae_patches + 1, 3 * mae.patch_size**2
    ends = 2 * tokens.mae * _mae_width(config) * width + 2 * length * width * values
    unshuffled = Cost(kept=INT64 * tokens.mae_patches * width)
    layers, weights = sizes.stacks["mae_decoder"]
    stack = frozen_on_the_way(
        layers, weights, length, width, width, mae.decoder_num_attention_heads, mae.decoder_intermediate_size
    )
    error = Cost(kept=FP32 * tokens.mae_patches * values)
    return Cost(ends, ends) + unshuffled + stack + norm(length, width) + error


def stage1_heads(config: XFormerConfig, work: Work) -> Cost:
    """ITC on queries and text against all GPUs' pairs, ITM on three pairs, ITG on each text token."""
    width, shared = config.qformer_config.hidden_size, config.image_text_hidden_size
    queries, tokens, vocabulary = config.num_query_tokens, work.text_tokens, config.qformer_config.vocab_size
    pairs = work.pictures * work.gpus
    itc = linear(queries, width, shared) + linear(1, width, shared)
    compared = 4 * queries * shared * pairs  # each way: all queries of a picture, or of all pictures, and one text
    itc += Cost(compared, 2 * compared, 2 * pairs * queries * BF16 + 3 * (queries + 1) * shared * FP32)
    itm = linear(3 * queries, width, 2)
    itg = linear(tokens, width, width) + Cost(kept=BF16 * tokens * width) + norm(tokens, width)
    itg += linear(tokens, width, vocabulary) + Cost(kept=FP32 * (tokens - 1) * vocabulary)
    return itc + itm + itg


def language_model(config: XFormerConfig, sizes: Sizes, work: Work) -> Cost:
    """One text: queries, prompt and what is learned through the frozen stack; the vocabulary on what is learned alone."""
    text = config.text_config
    length = config.num_query_tokens + work.prompt_tokens + work.text_tokens
    width, heads = text.hidden_size, text.num_attention_heads
    keys = width // heads * (getattr(text, "num_key_value_heads", None) or heads)
    inside = getattr(text, "ffn_dim", None) or text.intermediate_size
    kept_inside = (
        3 * inside if sizes.gated else inside
    )  # ReLU keeps its result; a gate its input, its result, the other
    stack = frozen_on_the_way(*sizes.stacks["language_model"], length, width, keys, heads, kept_inside)
    words = 2 * work.text_tokens * width * text.vocab_size
    return stack + norm(length, width) + Cost(words, words, FP32 * work.text_tokens * text.vocab_size)


def costs(config: XFormerConfig, sizes: Sizes, work: Work) -> dict[str, Cost]:
    """Of one picture, by part, in the order of the figure."""
    tokens, queries, text = tokens_of(config, work.stage), config.num_query_tokens, work.text_tokens
    parts = {"CLIP encoder": clip_encoder(config, sizes, tokens)}
    if config.mae_config is not None:
        parts["second encoder"] = second_encoder(config, sizes, tokens)
    if work.stage == 1:
        parts["Q-Former, queries | text (ITG, ITC)"] = qformer(config, tokens, queries, text)
        parts["Q-Former, text (ITC)"] = qformer(config, tokens, 0, text)
        parts["Q-Former, 3 pairs (ITM)"] = qformer(config, tokens, queries, text) * 3
        parts["fusion, once and 3 pairs"] = fusion(config, tokens, queries) * 4
        parts["heads of ITC, ITM, ITG"] = stage1_heads(config, work)
        if config.reconstruction:
            parts["MAE decoder"] = reconstruction(config, sizes, tokens)
        return parts
    read = work.prompt_tokens if work.instruction_aware else 0
    passes = work.texts if work.instruction_aware else 1
    parts["Q-Former"] = qformer(config, tokens, queries, read) * passes
    parts["fusion"] = fusion(config, tokens, queries) * passes
    parts["projection"] = linear(queries, config.qformer_config.hidden_size, config.text_config.hidden_size) * passes
    if config.reconstruction_in_stage2:
        parts["MAE decoder"] = reconstruction(config, sizes, tokens) * passes
    parts["language model"] = language_model(config, sizes, work) * work.texts
    return parts


# ---- memory and time


def memory(config: XFormerConfig, sizes: Sizes, work: Work) -> dict[str, int]:
    """Bytes on each GPU when a forward pass ends, by what they are for.

    The gradients are counted too, though most of them appear as activations go.
    """
    trained = sum(sizes.trained.values())
    return {
        "frozen weights (bf16)": BF16 * (sum(sizes.parameters.values()) - trained),
        "trained weights (fp32)": FP32 * trained,
        "gradients (fp32)": FP32 * trained,
        "gradient buckets of DDP (fp32)": FP32 * trained if work.gpus > 1 else 0,
        "AdamW's two moments (fp32)": 2 * FP32 * trained,
        "bf16 copies of trained weights": BF16 * sizes.cast,
        "kept for the backward pass": work.pictures * total(list(costs(config, sizes, work).values())).kept,
        "pictures to choose hard negatives from": _candidates(config, work) if work.stage == 1 else 0,
    }


def _candidates(config: XFormerConfig, work: Work) -> int:
    """C (fp32) and M (bf16) of all GPUs' pictures, and of the three pairs of each of ours."""
    tokens = tokens_of(config, 1)
    picture = FP32 * tokens.clip * config.clip_config.hidden_size
    if tokens.mae:
        picture += BF16 * tokens.mae * _mae_width(config)
    everywhere = work.pictures * work.gpus if work.gpus > 1 else 0
    return (everywhere + 3 * work.pictures) * picture


def step_seconds(
    config: XFormerConfig, sizes: Sizes, work: Work, gpu: Gpu, utilisation: float, passes: int = 1
) -> float:
    """Of an optimiser step with so many passes: products at a share of the peak, memory traffic at the bandwidth.

    What is kept for the backward pass is written once and read once.
    """
    of_picture = total(list(costs(config, sizes, work).values()))
    flops = work.pictures * (of_picture.forward + of_picture.backward)
    moved = 2 * work.pictures * of_picture.kept
    update = ADAMW_TRAFFIC * sum(sizes.trained.values())
    return passes * (flops / (utilisation * gpu.flops) + moved / gpu.bandwidth) + update / gpu.bandwidth


# ---- the command


def estimate(settings: EstimateConfig) -> dict[str, Any]:
    """Print what the recipe costs and return it.

    Raises:
        FileNotFoundError, ValueError: in one line, for a recipe, model or language model that cannot be read.
    """
    recipe = read_recipe(settings.recipe)
    config = model_config(recipe, settings.variant, settings.model)
    work = work_of(recipe, settings.batch_size or recipe["batch_size"], settings.count)
    result = _run(settings, recipe, config, work)
    if settings.compare:
        result["variants"] = _variants(settings, recipe, work)
    print(json.dumps(result, indent=2) if settings.json else show(result))
    return result


def _run(settings: EstimateConfig, recipe: dict[str, Any], config: XFormerConfig, work: Work) -> dict[str, Any]:
    gpu, sizes = GPUS[settings.gpu], sizes_of(empty_model(config, work.stage))
    parts, tokens = costs(config, sizes, work), tokens_of(config, work.stage)
    passes = recipe["gradient_accumulation_steps"]
    seconds = step_seconds(config, sizes, work, gpu, settings.utilisation, passes)
    held = memory(config, sizes, work)
    needed = round(sum(held.values()) * (1 + settings.reserve))
    pictures = work.pictures * work.gpus * passes
    hours = recipe["steps"] * seconds / 3600
    of_picture = total(list(parts.values()))
    return {
        "recipe": str(settings.recipe),
        "variant": settings.variant or recipe.get("variant") or "xformer",
        "gpu": {"name": settings.gpu, **asdict(gpu)},
        "assumed": {"utilisation": settings.utilisation, "reserve": settings.reserve},
        "work": asdict(work),
        "parameters": {name: [number, sizes.trained[name]] for name, number in sizes.parameters.items()},
        "per_picture": {name: asdict(cost) for name, cost in parts.items()},
        "tokens_per_picture": {
            "clip": tokens.clip,
            "second_encoder": tokens.mae,
            "queries": config.num_query_tokens,
            "text": work.text_tokens * work.texts,
        },
        "step": {
            "pictures": pictures,
            "flops_per_gpu": passes * work.pictures * (of_picture.forward + of_picture.backward),
            "seconds": seconds,
            "pictures_per_second": pictures / seconds,
        },
        "run": {
            "steps": recipe["steps"],
            "pictures": recipe["steps"] * pictures,
            "epochs": recipe["steps"] * pictures / (recipe.get("train_size") or settings.epoch),
            "text_tokens": recipe["steps"] * pictures * work.texts * work.text_tokens,
            "hours": hours,
            "gpu_hours": hours * work.gpus,
        },
        "memory": {
            **held,
            "reserve": needed - sum(held.values()),
            "needed": needed,
            "largest_batch_size": _largest(config, sizes, work, gpu.memory / (1 + settings.reserve)),
        },
    }


def _largest(config: XFormerConfig, sizes: Sizes, work: Work, room: float) -> int:
    """The most pictures whose pass fits; 0 if not even one does."""
    return bisect_right(
        range(1, MOST_PICTURES), room, key=lambda n: sum(memory(config, sizes, replace(work, pictures=n)).values())
    )


def _variants(settings: EstimateConfig, recipe: dict[str, Any], work: Work) -> dict[str, Any]:
    """Of each variant: FLOPs of a picture, seconds of a pass, bytes on a GPU, trained parameters."""
    rows = {}
    for name in VARIANTS:
        config = model_config(recipe, name, settings.model)
        sizes = sizes_of(empty_model(config, work.stage))
        of_picture = total(list(costs(config, sizes, work).values()))
        rows[name] = {
            "trained": sum(sizes.trained.values()),
            "flops_per_picture": of_picture.forward + of_picture.backward,
            "seconds": step_seconds(config, sizes, work, GPUS[settings.gpu], settings.utilisation),
            "memory": round(sum(memory(config, sizes, work).values()) * (1 + settings.reserve)),
        }
    return rows


# ---- as text


def show(result: dict[str, Any]) -> str:
    """What `estimate` returns, as tables."""
    work, gpu, assumed, run, step = (result[name] for name in ("work", "gpu", "assumed", "run", "step"))
    blocks = [
        f"{result['recipe']}: {result['variant']}, stage {work['stage']}, on {work['gpus']} x {gpu['name']}, "
        f"{work['pictures']} pictures each",
        _parameter_table(result["parameters"]),
        _part_table(result["per_picture"]),
        _lines(
            {
                "tokens of a picture": ", ".join(f"{n} {_word(w)}" for w, n in result["tokens_per_picture"].items()),
                "a step": f"{step['pictures']:,} pictures, {step['flops_per_gpu'] / 1e12:,.1f} TFLOP on each GPU, "
                f"{step['seconds']:.2f} s: {step['pictures_per_second']:,.0f} pictures/s",
                "the run": f"{run['steps']:,} steps, {run['pictures']:,} pictures ({run['epochs']:.2f} epochs), at most "
                f"{run['text_tokens'] / 1e9:.2f} G text tokens",
                "its time": f"{run['hours']:.1f} hours, {run['gpu_hours']:,.0f} GPU-hours, if matrix products reach "
                f"{100 * assumed['utilisation']:.0f} % of {gpu['flops'] / 1e12:.0f} TFLOP/s",
            }
        ),
        _memory_table(result),
    ]
    if "variants" in result:
        blocks.append(_variant_table(result["variants"]))
    return "\n\n".join(blocks)


def _word(name: str) -> str:
    return {"clip": "CLIP"}.get(name, name.replace("_", " "))


def _parameter_table(parameters: dict[str, list[int]]) -> str:
    rows = [[name, f"{number:,}", f"{trained:,}"] for name, (number, trained) in parameters.items()]
    sums = [f"{sum(column):,}" for column in zip(*parameters.values(), strict=True)]
    return _table(["part", "parameters", "trained"], [*rows, ["total", *sums]])


def _part_table(per_picture: dict[str, dict[str, int]]) -> str:
    parts = {name: Cost(**cost) for name, cost in per_picture.items()}
    parts["total"] = total(list(parts.values()))
    rows = [
        [name, f"{cost.forward / 1e9:.1f}", f"{cost.backward / 1e9:.1f}", f"{cost.kept / 1e6:.1f}"]
        for name, cost in parts.items()
    ]
    return _table(["of a picture", "GFLOP forward", "GFLOP backward", "MB kept"], rows)


def _memory_table(result: dict[str, Any]) -> str:
    held = dict(result["memory"])
    needed, largest = held.pop("needed"), held.pop("largest_batch_size")
    held[f"reserve (assumed, {100 * result['assumed']['reserve']:.0f} %)"] = held.pop("reserve")
    rows = [[name, f"{number / 1e9:.2f}"] for name, number in held.items() if number]
    room = result["gpu"]["memory"]
    verdict = "fits" if needed <= room else "does NOT fit"
    return (
        _table(["memory of a GPU", "GB"], [*rows, ["total", f"{needed / 1e9:.2f}"]])
        + f"\n{verdict} in {room / 1e9:.0f} GB; the largest batch_size that does: {largest}"
    )


def _variant_table(variants: dict[str, Any]) -> str:
    base = variants["qformer"]
    rows = []
    for name, row in variants.items():
        cells = [f"{row['trained'] / 1e6:.1f}"]
        for key, unit in (("flops_per_picture", 1e9), ("seconds", 1), ("memory", 1e9)):
            cells += [f"{row[key] / unit:,.2f}", f"{row[key] / base[key]:.3f}"]
        rows.append([name, *cells])
    head = ["variant", "M trained", "GFLOP a picture", "ratio", "s a pass", "ratio", "GB a GPU", "ratio"]
    return _table(head, rows)


def _lines(named: dict[str, str]) -> str:
    width = max(map(len, named))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in named.items())


def _table(head: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in [head, *rows]
    )
