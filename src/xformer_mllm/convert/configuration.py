"""The new model's configuration and tokenizers, from what the sources say of themselves or what their shapes tell."""

import re
from pathlib import Path
from typing import Any

from transformers import Blip2QFormerConfig, Blip2VisionConfig, PreTrainedTokenizerBase

from xformer_mllm.convert.files import Source, local, read_tokenizer
from xformer_mllm.convert.pieces import Pieces
from xformer_mllm.convert.settings import ConvertConfig
from xformer_mllm.convert.sources import Sources
from xformer_mllm.files import read_json
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.variants import variant_config, with_second_encoder

EVA_HEADS = 16  # of LAVIS's EVA-CLIP ViT-g (eva_vit.py create_eva_vit_g); no shape tells it
BERT_HEAD_WIDTH = 64
BERT_SETTINGS = (  # which a Q-Former has, too
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps"),
)


def build_config(
    settings: ConvertConfig, sources: Sources, pieces: Pieces, tower_pieces: Pieces, tokenizer: PreTrainedTokenizerBase
) -> XFormerConfig:
    """The variant of what the sources are. Raises ValueError where they do not go together."""
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
    """In the first group of `pattern`."""
    return sorted({int(match[1]) for name in pieces if (match := re.match(pattern, name))})


def vision_config(sources: Sources, pieces: Pieces) -> tuple[Any, int]:
    """The tower's configuration, and which of its layers gives C: the penultimate, -1 where the last is cut off."""
    if sources.tower_kind == "blip-2":
        return sources.tower.config.vision_config, -1
    if sources.tower_kind == "tower":
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
    """The Q-Former's configuration: the source's, or for LAVIS, which saves none, read off the shapes."""
    source, words = sources.qformer, _size(pieces, "embeddings.word_embeddings.weight")
    vocabulary = words if words and sources.kind != "bert" else len(tokenizer)
    if vocabulary < len(tokenizer):
        raise ValueError(
            f"{source.label}: knows {words} tokens, but the Q-Former's tokenizer has {len(tokenizer)}; name its own with "
            "--qformer-tokenizer"
        )
    fields: dict[str, Any]
    if sources.kind == "blip-2":
        fields = source.config.qformer_config.to_dict()
        del fields["model_type"]
    elif sources.kind == "bert":
        fields = {name: getattr(source.config, name) for name in BERT_SETTINGS}
    else:
        fields = _qformer_shape(source, pieces)
    fields |= {"encoder_hidden_size": clip_width, "vocab_size": vocabulary}
    return Blip2QFormerConfig(**fields | {"use_qformer_text_input": sources.llm is None})


def _qformer_shape(source: Source, pieces: Pieces) -> dict[str, Any]:
    """The fields of a Q-Former's configuration that its shapes tell."""
    layers = layer_numbers(pieces, r"qformer\.encoder\.layer\.(\d+)\.")
    crossing = layer_numbers(pieces, r"qformer\.encoder\.layer\.(\d+)\.crossattention")
    width = _size(pieces, "qformer.layernorm.weight")
    if not width or not crossing:
        raise ValueError(f"{source.label}: not a whole Q-Former (no layers with cross-attention in it)")
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // BERT_HEAD_WIDTH),
        "intermediate_size": _size(pieces, "qformer.encoder.layer.0.intermediate_query.dense.weight"),
        "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else 2,
        "max_position_embeddings": _size(pieces, "embeddings.position_embeddings.weight") or 512,
    }


def pixel_statistics(folder: Path | None) -> tuple[list | None, list | None]:
    """Mean and deviation that a checkpoint's image processor states; None for the default of its kind of tower."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if folder is not None and (folder / name).is_file():
            stated = read_json(folder / name)
            stated = stated.get("image_processor", stated)
            return stated.get("image_mean"), stated.get("image_std")
    return None, None


def qformer_tokenizer(settings: ConvertConfig, sources: Sources) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with [DEC], which starts a text that is to be generated (LAVIS blip2.py `init_tokenizer`)."""
    name = settings.qformer_tokenizer or (settings.qformer if sources.kind == "bert" else "bert-base-uncased")
    tokenizer = read_tokenizer(local(name, weights=False), name)
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(f"{name}: not a BERT's tokenizer (no [CLS], [SEP]); name one with --qformer-tokenizer")
    if tokenizer.bos_token_id is None:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def llm_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The language model's own; without a padding token, its end token pads."""
    assert source.folder is not None
    tokenizer = read_tokenizer(source.folder, source.label)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
