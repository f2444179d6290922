"""Parameters, stacks and casts, read from the model on the meta device."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import (
    TiedLinear,
    XFormerForConditionalGeneration,
    XFormerForPreTraining,
    XFormerPreTrainedModel,
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    parameters, trained: counts per part.
    stacks: for each frozen tower, the number of layers and of the weights in their linear layers.
    gated: whether the language model's feed-forward has a gate (as Llama's).
    cast: trained weights that autocast copies to bf16, for the backward pass too: linear layers but ITG's head.
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
    parameters: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = name.removeprefix("xformer.").split(".")[0]
        parameters[part] += parameter.numel()
        trained[part] += parameter.numel() * parameter.requires_grad
    base = model.xformer
    towers = {"clip_encoder": base.clip_encoder, "mae_encoder": base.mae_encoder, "mae_decoder": base.mae_decoder}
    towers["language_model"] = getattr(model, "language_model", None)
    trained_linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    cast = sum(m.weight.numel() for m in trained_linear if not isinstance(m, TiedLinear))
    stacks = {name: _stack(tower) for name, tower in towers.items() if tower}
    return Sizes(
        parameters, trained, stacks, any(name.endswith("gate_proj") for name, _ in model.named_modules()), cast
    )


def _stack(tower: nn.Module) -> tuple[int, int]:
    layers = max((part for part in tower.modules() if isinstance(part, nn.ModuleList)), key=len)
    return len(layers), sum(part.weight.numel() for part in layers.modules() if isinstance(part, nn.Linear))
