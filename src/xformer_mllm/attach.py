"""X-Former on an existing BLIP-2 or InstructBLIP: `attach_xformer(model, mae)` adds the fusion in place.

    pixels ─┬─> model.vision_model ──> C ──> model.qformer ──> Z_q ─┐
            │                                                       ├─ fusion ──> Z' ──> model.language_projection ──> …
            └─> second encoder (frozen) ──> M ──────────────────────┘

C and M are the tokens of the CLIP tower and of the second encoder (a MAE, for instance), Z_q the Q-Former's output, Z' the
fused queries. Two hooks do it: one on the vision model computes M, which C carries to the Q-Former as an attribute of its
tensor, so that nothing is kept on a module; one on the Q-Former replaces Z_q by Z'. The model's own parts, names and weights
stay as they are; `model.xformer` is new.

`B` batch, `Q` queries, `T` text tokens, `D` Q-Former width.
"""

import copy
import os
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
    ViTMAEModel,
)
from transformers.configuration_utils import PreTrainedConfig

from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.fusion import DualCrossAttention
from xformer_mllm.model.modeling_xformer import XFormerPreTrainedModel
from xformer_mllm.model.vision_encoders import build_tower, encode_second

SETTINGS = ("fusion_blocks", "mae_mean", "mae_std", "mae_image_size", "clip_mean", "clip_std", "initializer_range")

Model = TypeVar("Model", Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration)


class AttachedXFormer(XFormerPreTrainedModel):
    """`model.xformer`: the frozen second encoder and the dual cross-attention, saved and loaded like any model.

    Args:
        config: holds the model's own Q-Former and vision tower.
        mae_encoder: a pretrained tower of `config.mae_config`; a random one if None.
    """

    _keys_to_ignore_on_load_unexpected = (r"^(?!xformer\.)",)  # the model's own, if it was saved as a whole

    def __init__(self, config: XFormerConfig, mae_encoder: nn.Module | None = None):
        super().__init__(config)
        self.register_module("mae_encoder", None)  # first: config.json takes the model's dtype from it
        config.qformer_config._attn_implementation = config._attn_implementation  # the fusion reads it there
        tower = config.mae_config
        self.fusion = DualCrossAttention(
            tower.hidden_size, tower.num_attention_heads, config.fusion_blocks, config.qformer_config
        )
        self.post_init()  # initialises, so a pretrained encoder is added after it
        self.mae_encoder = build_tower(tower) if mae_encoder is None else _own(mae_encoder)
        self.handles: list[Any] = []

    def encode(self, _vision_model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Hook: the model's pixels, float[B, 3, H, W], back to [0, 1] -> M, an attribute of C."""
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        device = pixels.device if self.device.type == "meta" else self.device  # meta: offloaded
        pixels = pixels.to(device, torch.float32)
        mean, std = (pixels.new_tensor(s).view(1, 3, 1, 1) for s in (self.config.clip_mean, self.config.clip_std))
        output[0].mae_tokens = encode_second(self.mae_encoder, self.config, pixels * std + mean)[0].tokens

    def fuse(self, _qformer: nn.Module, _args: tuple, kwargs: dict, output: Any) -> Any:
        """Hook: the Q-Former's output [B, Q+T, D] with Z' in place of Z_q."""
        mae_tokens = getattr(kwargs.get("encoder_hidden_states"), "mae_tokens", None)
        if mae_tokens is None:
            raise ValueError("the Q-Former was called without the vision model's output, so X-Former has no pixels")
        states, count = output.last_hidden_state, self.config.num_query_tokens
        dtype = next(self.fusion.parameters()).dtype  # fp32, whatever the model's dtype
        queries, mae_tokens = (x.to(states.device, dtype) for x in (states[:, :count], mae_tokens))
        fused = self.fusion(queries, mae_tokens).queries.to(states.dtype)
        output.last_hidden_state = torch.cat([fused, states[:, count:]], dim=1)
        return output


def attach_xformer(model: Model, mae: PreTrainedModel | str | os.PathLike, **settings) -> Model:
    """Add the dual cross-attention over a second encoder to a model, in place; at step 0 the model answers as before.

    The model's own `requires_grad` is unchanged; the second encoder is frozen, the fusion trainable (fp32). The fusion's
    output projections start at zero, so Z' = Z_q bit for bit until it is trained.

    Args:
        model: a BLIP-2 or an InstructBLIP.
        mae: the second encoder, pretrained: a `ViTMAEModel`, a `ViTMAEForPreTraining`, or any vision tower of transformers.
            Or the folder (or Hub id) that `model.save_pretrained` or `model.xformer.save_pretrained` wrote, which
            restores the trained fusion. Or the result of `detach_xformer`.
        settings: fields of `XFormerConfig` for a fresh fusion: fusion_blocks; the second encoder's mae_mean, mae_std,
            mae_image_size; clip_mean, clip_std if the model's processor does not normalise as CLIP's;
            initializer_range. A saved fusion has its own.

    Returns:
        The same model.

    Raises:
        ValueError: if this cannot be attached.
    """
    if not isinstance(model, Blip2ForConditionalGeneration | InstructBlipForConditionalGeneration):
        kinds = "Blip2ForConditionalGeneration or InstructBlipForConditionalGeneration"
        raise ValueError(f"X-Former attaches to a {kinds}, not to a {type(model).__name__}")
    if hasattr(model, "xformer"):
        raise ValueError("an X-Former is attached to this model already; detach_xformer(model) removes it")
    if not isinstance(mae, PreTrainedModel | str | os.PathLike):
        raise ValueError(
            f"mae must be a vision tower of transformers or a saved fusion's folder, not a {type(mae).__name__}"
        )
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise ValueError(f"unknown settings: {', '.join(unknown)}; a fusion takes {', '.join(SETTINGS)}")
    if settings and isinstance(mae, AttachedXFormer | str | os.PathLike):
        raise ValueError(f"a saved or detached fusion has its own settings; leave out {', '.join(settings)}")
    if isinstance(mae, str | os.PathLike):
        mae = _load(mae)
    if isinstance(mae, AttachedXFormer):
        part = _fitting(mae, model)
    else:
        whole = mae if hasattr(mae, "embeddings") else mae.base_model  # a DINOv3's base model lacks its embeddings
        tower = getattr(whole, "vision_model", whole)
        if getattr(tower, "main_input_name", "pixel_values") != "pixel_values":
            raise ValueError(f"the second encoder must be a vision tower, not a {type(mae).__name__}")
        part = AttachedXFormer(_config(model, tower, settings), tower)
        part.freeze()
    part.to(model.query_tokens.device)
    part.train(model.training)
    part.handles = [
        model.vision_model.register_forward_hook(part.encode, with_kwargs=True),
        model.qformer.register_forward_hook(part.fuse, with_kwargs=True),
    ]
    model.xformer = part
    model.config.xformer_config = part.config.to_dict()  # saved in config.json, for loading the whole model
    return model


def detach_xformer(model: Model) -> AttachedXFormer:
    """Remove and return the fusion; the model keeps its own weights, as trained. `attach_xformer` accepts the result.

    Raises:
        ValueError: if nothing is attached.
    """
    if not hasattr(model, "xformer"):
        raise ValueError("no X-Former is attached to this model")
    part = model.xformer
    for handle in part.handles:
        handle.remove()
    del model.xformer, model.config.xformer_config
    return part


def _own(tower: nn.Module) -> nn.Module:
    """The tower itself; of a MAE one with the same weights that masks nothing, so the given one still masks."""
    if not isinstance(tower, ViTMAEModel):
        return tower
    with torch.device("meta"):
        own = build_tower(tower.config)
    own.load_state_dict(tower.state_dict(), assign=True)
    return own


def _config(model: Model, tower: PreTrainedModel, settings: dict) -> XFormerConfig:
    config = copy.deepcopy(model.config)
    qformer = config.qformer_config.to_dict()
    del qformer["model_type"]  # InstructBLIP's has the same fields
    return XFormerConfig(
        clip_config=config.vision_config,
        mae_config=copy.deepcopy(tower.config),
        qformer_config=qformer,
        num_query_tokens=config.num_query_tokens,
        reconstruction=False,
        dtype=tower.dtype,
        **settings,
    )


def _load(folder: str | os.PathLike) -> AttachedXFormer:
    fields, _ = PreTrainedConfig.get_config_dict(folder)
    whole = fields.get("xformer_config")
    if whole is None and AttachedXFormer.__name__ not in (fields.get("architectures") or ()):
        raise ValueError(f"{folder}: no attached X-Former was saved there")
    config = XFormerConfig.from_dict(whole or fields)
    part, report = AttachedXFormer.from_pretrained(folder, config=config, dtype="auto", output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{folder}: no attached X-Former was saved there ({min(report['missing_keys'])} is missing)")
    part.freeze()
    return part


def _fitting(part: AttachedXFormer, model: Model) -> AttachedXFormer:
    own = (part.config.num_query_tokens, part.config.qformer_config.hidden_size)
    asked = (model.config.num_query_tokens, model.config.qformer_config.hidden_size)
    if own != asked:
        raise ValueError(
            f"this X-Former is for {own[0]} queries of width {own[1]}, but the model has {asked[0]} of width {asked[1]}"
        )
    return part


__all__ = ["AttachedXFormer", "attach_xformer", "detach_xformer"]
