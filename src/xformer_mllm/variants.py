"""One function for each row of the paper's tables: what a variant changes in a base configuration.

config = VARIANTS["concat"](XFormerConfig.paper())
"""

import contextlib
import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from transformers import Dinov2Config, ViTMAEConfig
from transformers.configuration_utils import PreTrainedConfig

from xformer_mllm.model.configuration_xformer import XFormerConfig


def _with(base: XFormerConfig, **changes) -> XFormerConfig:
    fields = copy.deepcopy(base).to_dict() | changes
    return XFormerConfig(**{name: value for name, value in fields.items() if name != "model_type"})


def with_settings(base: XFormerConfig, settings: Sequence[str]) -> XFormerConfig:
    """Return `base` with other values of fields, given as "num_query_tokens=32" or "qformer_config.hidden_size=160".

    Raises:
        ValueError: for a field that the configuration does not have, or a value that does not fit.
    """
    fields = copy.deepcopy(base).to_dict()
    for setting in settings:
        name, equals, value = setting.partition("=")
        *parents, last = name.split(".")
        inside: Any = fields
        for parent in parents:
            inside = inside.get(parent) if isinstance(inside, dict) else None
        if not equals or not isinstance(inside, dict) or last not in inside or isinstance(inside[last], dict):
            raise ValueError(f"{setting}: expected NAME=VALUE with a field of the model's configuration")
        with contextlib.suppress(json.JSONDecodeError):  # anything else is a string
            value = json.loads(value)
        inside[last] = value
    try:
        return _with(base, **fields)
    except TypeError as error:
        raise ValueError(
            f"{' '.join(settings)}: a value of another kind than the configuration's ({error})"
        ) from error


def xformer(base: XFormerConfig) -> XFormerConfig:
    """X-Former: 55.0 VQAv2, 34.9 GQA, 34.2 OK-VQA; about 20M trainable over the Q-Former."""
    return _with(base, fusion="dual_cross_attention", reconstruction=True)


def qformer(base: XFormerConfig) -> XFormerConfig:
    """BLIP-2 on the same 14M pairs: 52.4 VQAv2, 33.1 GQA, 31.5 OK-VQA; 108M trainable. No second encoder."""
    return _with(base, fusion="none", reconstruction=False, mae_config=None)


def concat(base: XFormerConfig) -> XFormerConfig:
    """Concatenation: the Q-Former cross-attends to [C; project(M)]. 52.3 / 32.1 / 31.9; 110M trainable."""
    return _with(base, fusion="concat", reconstruction=False)


def early_cross_attention(base: XFormerConfig) -> XFormerConfig:
    """Early cross-attention: the Q-Former's layers cross-attend to M as well. 53.8 / 32.7 / 31.5; 183M trainable."""
    return _with(base, fusion="early_cross_attention", reconstruction=False)


def clip_shallow(base: XFormerConfig) -> XFormerConfig:
    """The MAE replaced by an earlier CLIP layer (26 of 39, here two thirds of the depth). 53.7 / 32.6 / 31.2."""
    layer = base.clip_config.num_hidden_layers * 2 // 3
    return _with(base, mae_config=None, clip_shallow_layer=layer, reconstruction=False)


def no_reconstruction(base: XFormerConfig) -> XFormerConfig:
    """X-Former without the reconstruction loss. 33.1 / 25.4 / 12.1."""
    return _with(base, fusion="dual_cross_attention", reconstruction=False)


def reconstruction_in_stage2(base: XFormerConfig) -> XFormerConfig:
    """X-Former that keeps the reconstruction loss in stage 2. 52.4 / 32.2 / 29.2."""
    return _with(base, fusion="dual_cross_attention", reconstruction=True, reconstruction_in_stage2=True)


def random_mae(base: XFormerConfig) -> XFormerConfig:
    """Not in the paper, a control: `no_reconstruction` with a MAE that was never trained.

    Its gain over `qformer` comes from a second set of tokens, not from masked reconstruction.
    """
    return no_reconstruction(base)


def with_second_encoder(base: XFormerConfig, tower: PreTrainedConfig) -> XFormerConfig:
    """Return `base` with another MAE, or any other vision tower, in place of its MAE.

    A tower that is not a MAE disables reconstruction.
    """
    changes = {"mae_config": tower, "mae_mean": None, "mae_std": None, "mae_image_size": None}
    if tower.model_type != ViTMAEConfig.model_type:
        changes |= {"reconstruction": False, "reconstruction_in_stage2": False}
    return _with(base, **changes)


def dinov2(base: XFormerConfig) -> XFormerConfig:
    """Not in the paper: X-Former whose MAE tokens come from a DINOv2, without reconstruction.

    A base whose second encoder is a MAE gets a DINOv2 of the same size; another tower (`with_second_encoder`) stays.
    """
    if base.has_mae:
        mae = base.mae_config
        tower = Dinov2Config(
            hidden_size=mae.hidden_size,
            num_hidden_layers=mae.num_hidden_layers,
            num_attention_heads=mae.num_attention_heads,
            mlp_ratio=max(1, mae.intermediate_size // mae.hidden_size),
            image_size=mae.image_size,
            patch_size=mae.patch_size,
        )
        base = with_second_encoder(base, tower)
    return no_reconstruction(base)


VARIANTS: dict[str, Callable[[XFormerConfig], XFormerConfig]] = {
    variant.__name__: variant
    for variant in (
        qformer,
        xformer,
        concat,
        early_cross_attention,
        clip_shallow,
        no_reconstruction,
        reconstruction_in_stage2,
        random_mae,
        dinov2,
    )
}


def variant_config(name: str, base: XFormerConfig) -> XFormerConfig:
    """Return the named variant of a base configuration.

    Raises:
        ValueError: if there is no such variant.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant '{name}' is unknown; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name](base)
