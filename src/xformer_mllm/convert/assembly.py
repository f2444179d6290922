"""Assemble the new model: its configuration, the origin of each tensor, and the files.

A tensor that is missing, left over or of another shape is an error, unless this is by design (the printed table states
the reason) or allowed by name.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from xformer_mllm.checkpoints import write_weights
from xformer_mllm.commands import ConvertConfig
from xformer_mllm.convert.layouts import (
    BLIP2,
    MAE,
    Pieces,
    as_they_are,
    blip2_pieces,
    drop,
    grown,
    mae_pieces,
    translate,
)
from xformer_mllm.convert.sources import MAE_SIZES, Source, Sources, local, read_tokenizer
from xformer_mllm.files import read_json
from xformer_mllm.language_models import check_positions
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import FROZEN, XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.model.processing_xformer import XFormerProcessor, image_processor
from xformer_mllm.variants import variant_config, with_second_encoder

EVA_HEADS = 16  # of LAVIS's EVA-CLIP ViT-g (eva_vit.py create_eva_vit_g); not visible in any shape
BERT_HEAD_WIDTH = 64
BERT_SETTINGS = (  # shared by the Q-Former
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps"),
)


def build_config(
    settings: ConvertConfig, sources: Sources, pieces: Pieces, tower_pieces: Pieces, tokenizer: PreTrainedTokenizerBase
) -> XFormerConfig:
    """Build the variant's configuration from the sources. Raises ValueError if they do not fit together."""
    vision, layer = vision_config(sources, tower_pieces)
    qformer = qformer_config(sources, pieces, tokenizer, vision.hidden_size)
    mean, deviation = pixel_statistics(sources.tower.folder)
    base = XFormerConfig(
        clip_config=vision,
        clip_feature_layer=layer,
        clip_mean=mean,
        clip_std=deviation,
        qformer_config=qformer,
        text_config=None if sources.llm is None else sources.llm.config,
        num_query_tokens=_size(pieces, "query_tokens", 1) or 32,
        image_text_hidden_size=_size(pieces, "vision_projection.weight") or 256,
        text_start_token_id=tokenizer.bos_token_id,
        fusion="none",
        reconstruction=False,
    )
    if sources.mae is not None:
        base = with_second_encoder(base, sources.mae.config)
        mean, deviation = pixel_statistics(sources.mae.folder)
        base.mae_mean, base.mae_std = mean or base.mae_mean, deviation or base.mae_std
    config = variant_config(settings.variant, base)
    for part in filter(None, (config, config.clip_config, config.mae_config, config.text_config)):
        part.dtype = settings.dtype
    config.qformer_config.dtype = "float32"
    return config


def _size(pieces: Pieces, name: str, dim: int = 0) -> int | None:
    return pieces[name].shape()[dim] if name in pieces else None


def layer_numbers(pieces: Pieces, pattern: str) -> list[int]:
    """Return the sorted layer numbers in the first group of `pattern`."""
    return sorted({int(match[1]) for name in pieces if (match := re.match(pattern, name))})


def vision_config(sources: Sources, pieces: Pieces) -> tuple[Any, int]:
    """Return the tower's configuration and the layer that gives C: the penultimate (-1 if the last is cut off)."""
    if sources.tower.kind == "blip-2":
        return sources.tower.config.vision_config, -1
    if not sources.tower.kind:
        return sources.tower.config, -2
    patches = "vision_model.embeddings.patch_embedding.weight"
    width, patch = _size(pieces, patches), _size(pieces, patches, 3)
    positions = _size(pieces, "vision_model.embeddings.position_embedding", 1)
    inner = _size(pieces, "vision_model.encoder.layers.0.mlp.fc1.weight")
    if not width or not patch or not positions or not inner:
        raise ValueError(
            f"{sources.tower.label}: not a whole EVA-CLIP (patches, positions or the first block are missing)"
        )
    layers = len(layer_numbers(pieces, r"vision_model\.encoder\.layers\.(\d+)\."))
    if not sources.own_tower:  # eva_vit_g.pth has 40; LAVIS builds and saves 39
        layers -= 1
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=EVA_HEADS,
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return config, -1


def qformer_config(
    sources: Sources, pieces: Pieces, tokenizer: PreTrainedTokenizerBase, clip_width: int
) -> Blip2QFormerConfig:
    """Return the Q-Former's configuration: the source's; for LAVIS, which saves none, derived from the shapes."""
    source, words = sources.qformer, _size(pieces, "embeddings.word_embeddings.weight")
    vocabulary = words if words and source.kind != "bert" else len(tokenizer)
    if vocabulary < len(tokenizer):
        raise ValueError(
            f"{source.label}: has embeddings of {words} tokens, but the Q-Former's tokenizer has {len(tokenizer)}; pass "
            "its own tokenizer with --qformer-tokenizer"
        )
    fields: dict[str, Any]
    if source.kind == "blip-2":
        fields = source.config.qformer_config.to_dict()
        del fields["model_type"]
    elif source.kind == "bert":
        fields = {name: getattr(source.config, name) for name in BERT_SETTINGS}
    else:
        layers = layer_numbers(pieces, r"qformer\.encoder\.layer\.(\d+)\.")
        crossing = layer_numbers(pieces, r"qformer\.encoder\.layer\.(\d+)\.crossattention")
        width = _size(pieces, "qformer.layernorm.weight")
        if not width or not crossing:
            raise ValueError(f"{source.label}: not a whole Q-Former (no layers with cross-attention in it)")
        fields = {
            "hidden_size": width,
            "num_hidden_layers": len(layers),
            "num_attention_heads": max(1, width // BERT_HEAD_WIDTH),
            "intermediate_size": _size(pieces, "qformer.encoder.layer.0.intermediate_query.dense.weight"),
            "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else 2,
            "max_position_embeddings": _size(pieces, "embeddings.position_embeddings.weight") or 512,
        }
    fields |= {"encoder_hidden_size": clip_width, "vocab_size": vocabulary}
    return Blip2QFormerConfig(**fields | {"use_qformer_text_input": sources.llm is None})


def pixel_statistics(folder: Path | None) -> tuple[list | None, list | None]:
    """Return the mean and deviation of a checkpoint's image processor; None for the tower's default."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if folder is not None and (folder / name).is_file():
            stated = read_json(folder / name)
            stated = stated.get("image_processor", stated)
            return stated.get("image_mean"), stated.get("image_std")
    return None, None


def qformer_tokenizer(settings: ConvertConfig, sources: Sources) -> PreTrainedTokenizerBase:
    """Return BERT's tokenizer with [DEC], which starts a generated text (LAVIS blip2.py `init_tokenizer`)."""
    own = settings.qformer if sources.qformer.kind == "bert" else "bert-base-uncased"
    name = settings.qformer_tokenizer or own
    try:
        folder = local(name, weights=False)
    except (OSError, ValueError) as error:  # its flag is named, because the default is not in the command
        raise ValueError(f"--qformer-tokenizer {error}") from None
    tokenizer = read_tokenizer(folder, name)
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(f"{name}: not a BERT's tokenizer (no [CLS], [SEP]); name one with --qformer-tokenizer")
    if tokenizer.bos_token_id is None:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def llm_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Return the language model's tokenizer; if it has no padding token, the end token pads."""
    assert source.folder is not None
    tokenizer = read_tokenizer(source.folder, source.label)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Target:
    """The new model, still empty, and its sources.

    dtype: of the frozen parts. model: on the meta device. pieces, tower_pieces: the Q-Former's and the tower's, by
    BLIP-2's names. wanted: new name -> tensor to save, on the meta device, in its saved dtype.
    """

    settings: ConvertConfig
    sources: Sources
    dtype: torch.dtype
    model: PreTrainedModel
    processor: XFormerProcessor
    pieces: Pieces
    tower_pieces: Pieces
    wanted: dict[str, torch.Tensor]

    @property
    def config(self) -> XFormerConfig:
        return self.model.config

    @property
    def stage2(self) -> bool:
        return self.sources.llm is not None


def build_target(settings: ConvertConfig, sources: Sources) -> Target:
    """Build the configuration, processor and empty model. Raises ValueError if the sources do not fit."""
    pieces = tower_pieces = blip2_pieces(sources.qformer)
    if not sources.own_tower:
        tower_pieces = blip2_pieces(sources.tower)
        drop(tower_pieces, r"(?!vision_model\.)", "only the tower is taken from --clip")
    tokenizer = qformer_tokenizer(settings, sources)
    config = build_config(settings, sources, pieces, tower_pieces, tokenizer)
    images = image_processor(config.clip_config.image_size)
    kind: Any
    if sources.llm is None:
        kind, processor = XFormerForPreTraining, XFormerProcessor(images, tokenizer, tokenizer)
    else:
        texts, queries = llm_tokenizer(sources.llm), config.num_query_tokens
        check_positions(sources.llm.label, sources.llm.config, queries)
        decodes = sources.llm.config.is_encoder_decoder
        kind = XFormerForConditionalGeneration
        processor = XFormerProcessor(images, texts, tokenizer, queries, encoder_decoder=decodes)
        config.image_token_index = processor.image_token_id
    with torch.device("meta"):
        model = kind(config)
    if sources.qformer.kind == "bert":  # its vocabulary lacks [DEC]
        for name, deviation in (("embeddings.word_embeddings.weight", config.initializer_range), ("itg_bias", 0.0)):
            if name in pieces:
                pieces[name] = grown(pieces[name], config.qformer_config.vocab_size, deviation)
    dtype, wanted = getattr(torch, settings.dtype), {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            saved = dtype if part_of(name) in FROZEN else torch.float32
            wanted[name] = tensor.to(saved) if tensor.is_floating_point() else tensor
    return Target(settings, sources, dtype, model, processor, pieces, tower_pieces, wanted)


def part_of(name: str) -> str:
    """Return the part of the model that a name belongs to, as in the printed table."""
    name = name.removeprefix("xformer.")
    if re.match(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.", name):
        return "qformer (text)"
    return name.split(".")[0]


_LAYER = r"encoder\.layer\.\d+\."
TOWER = r"xformer\.clip_encoder\.(?!tower\.post_layernorm)"
SECOND_ENCODER = r"xformer\.mae_(encoder|decoder)\."
ATTENDS = rf"xformer\.qformer\.(layernorm|{_LAYER}attention)\."
READS_IMAGES = (
    r"xformer\.(query_tokens$|clip_layernorm\.)"
    rf"|xformer\.qformer\.{_LAYER}(crossattention|intermediate_query|output_query)\."
)
READS_TEXT = rf"xformer\.(embeddings|qformer\.{_LAYER}(intermediate|output))\."
SCORES = r"(vision_projection|text_projection|itm_head)\."
WRITES_TEXT = r"itg_|temperature$"
PROJECTION = r"language_projection\."
LANGUAGE_MODEL = r"language_model\."

# Initialised without --allow, because no source of the kind has them.
ALWAYS_FRESH = r"xformer\.(fusion|clip_encoder\.tower\.post_layernorm)\."  # the latter (a BLIP-2 tower's) is never run
FRESH_AFTER_BERT = r"xformer\.(query_tokens$|clip_layernorm\.|qformer\..*\.crossattention\.)|temperature$|" + SCORES

LeftOver = dict[tuple[str, str], list[str]]
"""(source, reason) -> its tensors; the reason is "" if it is unknown and not allowed."""


@dataclass(frozen=True)
class Plan:
    """The origin of each tensor. copied: name -> piece. fresh: initialised names. left: unused source tensors."""

    copied: Pieces
    fresh: list[str]
    left: LeftOver

    def initialises(self, *patterns: str) -> bool:
        """Return whether any initialised tensor's name matches one of `patterns`."""
        return any(re.match("|".join(patterns), name) for name in self.fresh)


def make_plan(target: Target) -> Plan:
    """Determine the origin of every tensor.

    Raises:
        ValueError: naming a tensor that is missing, of another shape or left over, and not allowed.
    """
    copied: Pieces = {}
    misshapen: Pieces = {}
    for name, piece in our_pieces(target).items():
        if name in target.wanted:
            fits = piece.shape() == target.wanted[name].shape
            (copied if fits else misshapen)[name] = piece
    for piece in misshapen.values():
        piece.leave("of another shape")
    plan = Plan(copied, [name for name in target.wanted if name not in copied], left_over(target, copied))
    if errors := list(_errors(target, plan, misshapen)):
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        advice = "--allow NAME allows it to be initialised or left over (* matches anything)"
        raise ValueError(f"{errors[0]}{more}; {_hint(target, plan)}{advice}")
    return plan


def our_pieces(target: Target) -> Pieces:
    """Return every piece by its new name, without those this model does not use by design."""
    sources, config = target.sources, target.config
    ours = translate(target.pieces, BLIP2)
    if not target.stage2:
        drop(ours, PROJECTION, "stage 2 only")
    else:
        drop(ours, f"{READS_TEXT}|{SCORES}|{WRITES_TEXT}", "stage 1 only")
        if not sources.llm_fits:
            drop(ours, PROJECTION, "made for another language model")
    if not sources.own_tower:
        drop(ours, TOWER, "the tower comes from --clip")
        tower = target.tower_pieces.items()
        ours |= {f"xformer.clip_encoder.tower.{name.removeprefix('vision_model.')}": piece for name, piece in tower}
    layers = r"xformer\.clip_encoder\.tower\.(?:.+\.)?layers?\.({})\."
    for number in layer_numbers(ours, layers.format(r"\d+")):
        if number > max(target.model.xformer.clip_encoder.read_layers):
            drop(ours, layers.format(number), "after the layer that is read")
    if sources.mae is not None and config.has_mae:
        ours |= translate(mae_pieces(sources.mae), MAE)
        if not config.reconstruction:
            drop(ours, r"xformer\.mae_decoder\.", "the variant has no reconstruction")
    elif sources.mae is not None:
        ours |= as_they_are(sources.mae, "xformer.mae_encoder.{}".format)
    if sources.llm is not None:
        ours |= as_they_are(sources.llm, "language_model.{}".format)
    return ours


def left_over(target: Target, copied: Pieces) -> LeftOver:
    """Group the source tensors that are not copied by their source and the reason."""
    used = {(id(piece.source), name) for piece in copied.values() for name in piece.names}
    tied = {name.removeprefix("language_model.") for name in target.model.all_tied_weights_keys}
    left: LeftOver = {}
    for source in target.sources.all():
        for name in {**source.tensors, **source.left}:
            if (id(source), name) not in used and not (source is target.sources.llm and name in tied):
                reason = source.left.get(name) or ("allowed" if allowed(name, target.settings.allow) else "")
                left.setdefault((source.label, reason), []).append(name)
    return left


def allowed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _errors(target: Target, plan: Plan, misshapen: Pieces) -> Iterable[str]:
    """Yield what is wrong with a plan, most informative first."""
    allow, wanted = target.settings.allow, target.wanted
    for name, piece in misshapen.items():
        if not allowed(name, allow):
            has, needs = tuple(piece.shape()), tuple(wanted[name].shape)
            yield f"'{name}' is {has} in {piece.source.label}, the model needs {needs}"
    usual = [ALWAYS_FRESH]
    if target.sources.qformer.kind == "bert":
        usual.append(FRESH_AFTER_BERT)
    if "language_projection.weight" not in target.pieces:
        usual.append(PROJECTION)
    for name in plan.fresh:
        if not (name in misshapen or re.match("|".join(usual), name) or allowed(name, allow)):
            yield f"no source has '{name}'"
    for (label, reason), names in plan.left.items():
        if not reason:
            yield from (f"{label} has '{name}', which has no place in the model" for name in names)


def _hint(target: Target, plan: Plan) -> str:
    parts = {part_of(name) for name in plan.fresh}
    if "mae_decoder" in parts:
        mae, elsewhere = target.sources.mae, ""
        if mae is not None and mae.kind == "a MAE":
            elsewhere = f"mae_visualize_vit_{MAE_SIZES[mae.config.hidden_size][0]}.pth has it, or "
        return f"this MAE has no decoder to reconstruct with: {elsewhere}use --variant no_reconstruction; "
    if "embeddings" in parts:
        return "a stage-2 BLIP-2 lacks the text branch that stage 1 needs; LAVIS's blip2_pretrained.pth has it; "
    if "language_projection" in parts and not target.sources.llm_fits:
        return "the Q-Former's projection was made for another language model; "
    return ""


SHARD_BYTES = 2 * 1024**3


def write_model(folder: Path, plan: Plan, target: Target) -> None:
    """Write everything `from_pretrained` needs, then release the language model, which is held in memory."""
    target.config.architectures = [type(target.model).__name__]
    target.config.save_pretrained(folder)
    target.processor.save_pretrained(folder)
    if target.stage2:
        generation_settings(plan, target).save_pretrained(folder)
    new = initialised(target.model, plan.fresh, target.settings.seed)

    def read(name: str) -> torch.Tensor:
        return plan.copied[name].tensor() if name in plan.copied else new[name]

    write_weights(folder, target.wanted, read, SHARD_BYTES)
    if target.sources.llm is not None:
        target.sources.llm.tensors.clear()


def initialised(model: PreTrainedModel, names: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """Initialise the named tensors of a meta-device model by its `_init_weights`; the others stay on meta."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        shape = getattr(model.get_submodule(parent), leaf).shape
        empty = nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, empty)
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    torch.manual_seed(seed)
    model.initialize_weights()
    state = model.state_dict()
    for name in names:
        if state[name].isnan().any():
            raise ValueError(f"'{name}' cannot be initialised: {type(model).__name__} has no rule for it")
    return {name: state[name] for name in names}


def generation_settings(plan: Plan, target: Target) -> GenerationConfig:
    """Return the language model's settings; after a BLIP-2's projection a text ends as in BLIP-2: with OPT at a newline."""
    llm, qformer = target.sources.llm, target.sources.qformer
    assert llm is not None
    assert llm.folder is not None
    settings = GenerationConfig.from_model_config(llm.config)
    if (llm.folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(llm.folder)
    if "language_projection.weight" in plan.copied:
        if qformer.kind == "blip-2":
            settings.eos_token_id = qformer.config.text_config.eos_token_id
        elif not llm.config.is_encoder_decoder:  # LAVIS blip2_opt.py; blip2_t5.py keeps T5's own end
            newline = target.processor.tokenizer("\n", add_special_tokens=False)["input_ids"]
            settings.eos_token_id = newline[0] if newline else settings.eos_token_id
    return settings
