"""The checkpoints that a conversion is made of: which is what, and whether it can be that."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from xformer_mllm.convert.files import Source, first_line, local, open_folder, open_pth, read_config
from xformer_mllm.convert.settings import ConvertConfig
from xformer_mllm.language_models import language_model_dir
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import without_dropout
from xformer_mllm.model.vision_encoders import build_tower
from xformer_mllm.variants import variant_config


@dataclass
class Sources:
    """Those of a conversion. kind: of --qformer, "blip-2", "bert" or "lavis"; tower_kind: "blip-2", "eva", "tower"."""

    qformer: Source
    kind: str
    tower: Source
    tower_kind: str
    mae: Source | None = None
    llm: Source | None = None

    @property
    def own_tower(self) -> bool:
        """Whether the Q-Former's source has its own tower."""
        return self.tower is self.qformer

    @property
    def whole_blip2(self) -> bool:
        """Whether transformers can load the Q-Former's source with its own tower as one BLIP-2."""
        return self.kind == "blip-2" and self.own_tower

    @property
    def llm_fits(self) -> bool:
        """Whether --llm is what a BLIP-2's projection was trained for, as far as its configuration can tell."""
        if self.kind != "blip-2" or self.llm is None:
            return True
        sizes = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
        theirs, ours = self.qformer.config.text_config, self.llm.config
        return all(getattr(theirs, size, None) == getattr(ours, size, None) for size in sizes)

    def all(self) -> list[Source]:
        found = [self.qformer, None if self.own_tower else self.tower, self.mae, self.llm]
        return [source for source in found if source is not None]


def open_sources(settings: ConvertConfig) -> Sources:
    """Open every checkpoint that the settings name.

    Raises:
        ValueError, OSError: in one line, for one that cannot be read or cannot be what it is named as.
    """
    if settings.variant == "random_mae":
        raise ValueError("variant random_mae has a MAE that was never trained: there is nothing to convert for it")
    second = variant_config(settings.variant, XFormerConfig.paper()).mae_config is not None
    if second and settings.mae is None:
        raise ValueError(
            f"variant {settings.variant} has a second encoder: name it with --mae (facebook/vit-mae-huge)"
        )
    if not second and settings.mae is not None:
        raise ValueError(f"variant {settings.variant} has no second encoder: leave --mae out")
    qformer, kind = _open_qformer(settings.qformer)
    sources = Sources(qformer, kind, *_open_clip(settings, qformer, kind))
    if settings.mae is not None:
        sources.mae = _open_mae(settings.mae, settings.dtype)
    if settings.llm is not None:
        sources.llm = _open_language_model(settings.llm, settings.dtype)
    return sources


def _open_qformer(name: str) -> tuple[Source, str]:
    """The Q-Former's checkpoint and its kind."""
    path = local(name)
    if path.is_file():
        source = open_pth(name, path)
        kind = "lavis" if any(key.startswith("Qformer.") for key in source.tensors) else "a .pth without Q-Former"
    else:
        config = read_config(path, name)
        source, kind = open_folder(name, path, config), config.model_type
    if kind not in ("blip-2", "bert", "lavis"):
        raise ValueError(
            f"{name}: {kind}; --qformer takes a BLIP-2 or a BERT of transformers, or LAVIS's blip2_pretrained*.pth"
        )
    return source, kind


def _open_clip(settings: ConvertConfig, qformer: Source, kind: str) -> tuple[Source, str]:
    """The checkpoint that has the CLIP tower, --clip's or the Q-Former's own, and its kind."""
    name = settings.clip
    if name is None:
        if kind == "blip-2":
            return qformer, "blip-2"
        if "visual_encoder.cls_token" in qformer.tensors:
            return qformer, "eva"
        raise ValueError(
            f"{settings.qformer}: has no CLIP tower; name it with --clip (for LAVIS's files its eva_vit_g.pth, or "
            "Salesforce/blip2-opt-2.7b)"
        )
    path = local(name)
    if path.is_file():
        source = open_pth(name, path)
        if "blocks.0.attn.qkv.weight" not in source.tensors:
            raise ValueError(f"{name}: not LAVIS's EVA-CLIP (no tensor 'blocks.0.attn.qkv.weight')")
        return source, "eva"
    config = read_config(path, name)
    if config.model_type == "blip-2":
        return open_folder(name, path, config), "blip-2"
    return _load_tower(name, path, config, settings.dtype), "tower"


def _open_mae(name: str, dtype: str) -> Source:
    """The second encoder: a MAE, read tensor by tensor, or any other vision tower."""
    folder = local(name)
    if folder.is_file():
        raise ValueError(f"{name}: --mae takes a hub id or a folder of transformers (facebook/vit-mae-huge)")
    config = read_config(folder, name)
    if config.model_type == "vit_mae":
        return open_folder(name, folder, config)
    return _load_tower(name, folder, config, dtype)


def _load_tower(name: str, folder: Path, config: Any, dtype: str) -> Source:
    """Any vision tower that AutoModel knows, alone or within a CLIP or SigLIP, loaded by transformers."""
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "patch_size"):
        raise ValueError(f"{name}: a {config.model_type} is no vision tower")
    try:
        with torch.device("meta"):
            kind = type(build_tower(vision))
    except ValueError:
        raise ValueError(f"{name}: a {config.model_type} has no vision tower that transformers can build") from None
    source = _loaded(name, folder, kind, vision, dtype)
    if vision is not config:
        for key in source.left:
            if re.match(r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$", key):
                source.left[key] = "outside of the vision tower"
    return source


def _open_language_model(name: str, dtype: str) -> Source:
    """A frozen causal language model, without dropout, loaded by transformers: its layout may be any."""
    folder = local(str(language_model_dir(name)))
    config = read_config(folder, name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: a {config.model_type} is no causal language model")
    return _loaded(name, folder, AutoModelForCausalLM, without_dropout(config), dtype)


def _loaded(name: str, folder: Path, kind: Any, config: Any, dtype: str) -> Source:
    """A checkpoint by transformers' own loader; what it found missing or misshapen is so in the source, too."""
    try:
        model, report = kind.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name}: {first_line(error)}") from None
    state = model.state_dict()
    tensors = {key: tensor.to("meta") for key, tensor in state.items() if key not in report["missing_keys"]}
    tensors |= {key: torch.empty(shape, device="meta") for key, shape, _ in report["mismatched_keys"]}
    return Source(
        name, tensors, state.__getitem__, folder, model.config, dict.fromkeys(sorted(report["unexpected_keys"]), "")
    )
