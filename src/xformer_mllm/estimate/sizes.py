"""Parameters, stacks and casts, read from the model on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import (
    XFormerForConditionalGeneration,
    XFormerForPreTraining,
    XFormerPreTrainedModel,
)


@dataclass(frozen=True)
class Sizes:
    """Sizes read from a model on the meta device.

    parameters, trained: per part.
    stacks: of each frozen tower, its number of layers and the weights of its linear layers, applied to every token.
    gated: whether the language model's feed-forward has a gate (Llama's kind).
    cast: trained weights that autocast copies to bf16: those of linear layers, and the embeddings tied to ITG's head.
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
    return Sizes(
        parameters, trained, {name: _stack(tower) for name, tower in towers.items() if tower}, bool(gates), cast
    )


def _stack(tower: nn.Module) -> tuple[int, int]:
    layers = max((part for part in tower.modules() if isinstance(part, nn.ModuleList)), key=len)
    return len(layers), sum(part.weight.numel() for part in layers.modules() if isinstance(part, nn.Linear))
