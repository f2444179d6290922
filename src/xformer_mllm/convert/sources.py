"""The checkpoints that a conversion reads: Hub ids, folders or .pth files.

Tensors are read one at a time, and no code is unpickled.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ViTMAEConfig,
)
from transformers.configuration_utils import PreTrainedConfig

from xformer_mllm.checkpoints import check_language_model
from xformer_mllm.commands import ConvertConfig
from xformer_mllm.files import first_sentence, read_json
from xformer_mllm.language_models import language_model_dir
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import language_model_class, without_dropout
from xformer_mllm.model.vision_encoders import build_tower
from xformer_mllm.variants import variant_config


@dataclass
class Source:
    """A checkpoint.

    label: as the user named it. kind: "blip-2", "bert", "vit_mae", "LAVIS", "EVA-CLIP", "a MAE" (facebookresearch/mae's
    own file), or "" if loaded by transformers. tensors: by their names in the checkpoint; those of files are mapped and
    read when used. folder: None for a .pth file. config: None for LAVIS's files; for a MAE's file from its shapes.
    left: names without a use in the new model -> the reason ("" if unknown).
    """

    label: str
    kind: str
    tensors: dict[str, torch.Tensor]
    folder: Path | None = None
    config: Any = None
    left: dict[str, str] = field(default_factory=dict)


def local(name: str, weights: bool = True) -> Path:
    """Return a local path as it is; for a Hub id the downloaded folder (safetensors weights preferred)."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name}: no such file or folder")
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"]))
        if weights:
            snapshot_download(name, allow_patterns=["model*.safetensors"])
            if not list(folder.glob("model*.safetensors")):
                snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: no such file or folder, and not available on the Hub ({first_sentence(error)}); download it on a "
            "machine with network access and pass its folder"
        ) from None
    return folder


def read_config(folder: Path, label: str) -> PreTrainedConfig:
    """Read a transformers folder's configuration. Raises ValueError if it is missing or of an unknown kind."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{label}: not a checkpoint of transformers (no config.json in it)")
    kind = read_json(folder / "config.json").get("model_type")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError):
        raise ValueError(f"{label}: an architecture that transformers does not know ('{kind}')") from None


def read_tokenizer(folder: Path, label: str) -> PreTrainedTokenizerBase:
    """Read a folder's tokenizer. Raises ValueError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{label}: no tokenizer could be read from it ({first_sentence(error)})") from None


def _read_folder(folder: Path, label: str) -> dict[str, torch.Tensor]:
    """Read a transformers folder's tensors, with the names as they are saved."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{label}: no weights in it (model.safetensors or pytorch_model.bin)")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file) if file.suffix == ".safetensors" else _unpickled(file)[0]
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or cut short ({error}); download it again") from None
    return tensors


def _unpickled(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the state dict of a torch.save file, and the arguments of the run that saved it, if it has any.

    Only tensors, plain containers and argparse's arguments are unpickled. LAVIS and the MAE's authors put the state dict
    under "model". The tensors stay on disk until used, if the file's format allows it.
    """
    try:
        # The MAE's main_pretrain.py saves its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes raises anything
        raise ValueError(f"{file}: not a checkpoint that can be read safely ({first_sentence(error)})") from None
    state = content.get("model", content) if isinstance(content, dict) else None
    tensors = {key: t for key, t in state.items() if isinstance(t, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{file}: not a checkpoint (no tensors in it)")
    arguments = content.get("args")
    return tensors, vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


@dataclass
class Sources:
    """The checkpoints of a conversion. tower: the one that has the CLIP tower, --clip's or the Q-Former's own."""

    qformer: Source
    tower: Source
    mae: Source | None = None
    llm: Source | None = None

    @property
    def own_tower(self) -> bool:
        return self.tower is self.qformer

    @property
    def whole_blip2(self) -> bool:
        """Whether transformers can load the Q-Former's source with its own tower as one BLIP-2."""
        return self.qformer.kind == "blip-2" and self.own_tower

    @property
    def llm_fits(self) -> bool:
        """Whether a BLIP-2's projection was trained for --llm, judging by the configurations.

        LAVIS's files have none; the names tell whether it was trained for an encoder-decoder (FlanT5).
        """
        if self.qformer.kind == "LAVIS" and self.llm is not None:
            others = "opt_proj." if self.llm.config.is_encoder_decoder else "t5_proj."
            return not any(name.startswith(others) for name in self.qformer.tensors)
        if self.qformer.kind != "blip-2" or self.llm is None:
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
        ValueError, OSError: if one cannot be read, or is of the wrong kind for its flag.
    """
    if settings.variant == "random_mae":
        raise ValueError("variant random_mae has an untrained MAE: there is nothing to convert")
    second = variant_config(settings.variant, XFormerConfig.paper()).mae_config is not None
    if second and settings.mae is None:
        raise ValueError(
            f"variant {settings.variant} has a second encoder: name it with --mae (facebook/vit-mae-huge)"
        )
    if not second and settings.mae is not None:
        raise ValueError(f"variant {settings.variant} has no second encoder: leave --mae out")
    qformer = _open("--qformer", settings.qformer, settings.dtype)
    if settings.clip is not None:
        sources = Sources(qformer, _open("--clip", settings.clip, settings.dtype))
    elif qformer.kind == "blip-2" or "visual_encoder.cls_token" in qformer.tensors:
        sources = Sources(qformer, qformer)
    else:
        raise ValueError(
            f"{settings.qformer}: has no CLIP tower; name it with --clip (for LAVIS's files its eva_vit_g.pth, or "
            "Salesforce/blip2-opt-2.7b)"
        )
    if settings.mae is not None:
        sources.mae = _open("--mae", settings.mae, settings.dtype)
    if settings.llm is not None:
        sources.llm = _open_language_model(settings.llm, settings.dtype)
    return sources


ACCEPTED = {
    "--qformer": (("blip-2", "bert", "LAVIS"), "a BLIP-2 or a BERT of transformers, or LAVIS's blip2_pretrained*.pth"),
    "--clip": (("blip-2", "EVA-CLIP"), "LAVIS's eva_vit_g.pth, a BLIP-2, or a vision tower of transformers"),
    "--mae": (
        ("vit_mae", "a MAE"),
        "a Hub id or a folder of transformers (facebook/vit-mae-huge), or the MAE's mae_visualize_vit_*.pth",
    ),
}
"""Flag -> the kinds of checkpoint that are read tensor by tensor, and what the flag takes, for messages."""


def _open(flag: str, name: str, dtype: str) -> Source:
    """Open a checkpoint of an accepted kind, or as --clip or --mae any other vision tower."""
    path, (kinds, takes) = local(name), ACCEPTED[flag]
    if path.is_file():
        tensors, arguments = _unpickled(path)
        kind = "EVA-CLIP" if "blocks.0.attn.qkv.weight" in tensors else "an unknown layout"
        kind = "a MAE" if {"blocks.0.attn.qkv.bias", *MAE_SHAPES} <= tensors.keys() else kind
        kind = "LAVIS" if any(key.startswith("Qformer.") for key in tensors) else kind
        if kind in kinds:
            config = mae_config(name, tensors, arguments) if kind == "a MAE" else None
            return Source(name, kind, tensors, config=config)
        raise ValueError(f"{name}: holds {kind}; {flag} takes {takes}")
    config = read_config(path, name)
    if config.model_type in kinds:
        return Source(name, config.model_type, _read_folder(path, name), path, config)
    if flag == "--qformer":
        raise ValueError(f"{name}: holds {config.model_type}; {flag} takes {takes}")
    return _load_tower(name, path, config, dtype)


MAE_SHAPES = ("patch_embed.proj.weight", "pos_embed")  # these show the sizes
MAE_SIZES = {768: ("base", 12), 1024: ("large", 16), 1280: ("huge", 16)}
"""Width of facebookresearch/mae's encoders -> their name and number of heads, which no shape shows."""


def mae_config(label: str, tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> ViTMAEConfig:
    """Derive the configuration of facebookresearch/mae's own checkpoint from its shapes.

    Whether it reconstructs normalised patches is in the arguments of main_pretrain.py. Published files have none:
    mae_pretrain_vit_*_full.pth does, mae_visualize_vit_*.pth does not (facebookresearch/mae issues 8 and 12).

    Raises ValueError for an unknown width.
    """
    (width, _, patch, _), positions = (tensors[name].shape for name in MAE_SHAPES)
    decoder = tensors["mask_token"].shape[-1] if "mask_token" in tensors else 512
    if width not in MAE_SIZES or decoder != 512:
        raise ValueError(
            f"{label}: its width {width} (decoder {decoder}) is of no published MAE, so the number of heads is unknown; "
            "convert it to a folder of transformers"
        )
    return ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=_blocks(tensors, "blocks."),
        num_attention_heads=MAE_SIZES[width][1],
        intermediate_size=4 * width,
        image_size=round((positions[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
        decoder_hidden_size=decoder,
        decoder_num_hidden_layers=_blocks(tensors, "decoder_blocks.") or 8,
        decoder_num_attention_heads=16,
        decoder_intermediate_size=4 * decoder,
        norm_pix_loss=arguments.get("norm_pix_loss", Path(label).name.startswith("mae_pretrain")),
    )


def _blocks(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(prefix)})


def _load_tower(name: str, folder: Path, config: Any, dtype: str) -> Source:
    """Load any vision tower that AutoModel knows, alone or as part of a CLIP or SigLIP."""
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "patch_size"):
        raise ValueError(f"{name}: a {config.model_type} is not a vision tower")
    try:
        with torch.device("meta"):
            kind = type(build_tower(vision))
    except ValueError:
        raise ValueError(f"{name}: a {config.model_type} has no vision tower that transformers can build") from None
    source = _loaded(name, folder, kind, vision, dtype)
    if vision is not config:
        for key in source.left:
            if re.match(r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$", key):
                source.left[key] = "not part of the vision tower"
    return source


def _open_language_model(name: str, dtype: str) -> Source:
    """Load a language model of any layout, causal or encoder-decoder, with transformers, without dropout."""
    folder = local(str(language_model_dir(name)))
    config = read_config(folder, name)
    check_language_model(name, config)
    return _loaded(name, folder, language_model_class(config), without_dropout(config), dtype)


def _loaded(name: str, folder: Path, kind: Any, config: Any, dtype: str) -> Source:
    """Load a checkpoint with transformers, without the tensors it lacks; mismatched ones have their own shape."""
    try:
        model, report = kind.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name}: {first_sentence(error)}") from None
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in report["missing_keys"]}
    tensors |= {key: torch.empty(shape, device="meta") for key, shape, _ in report["mismatched_keys"]}
    left = dict.fromkeys(sorted(report["unexpected_keys"]), "")
    return Source(name, "", tensors, folder, model.config, left)
