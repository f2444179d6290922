"""FSDP settings for our models; accelerate does the sharding.

Every layer of the large frozen parts (encoders, language model) is sharded and gathered only while it computes; frozen bf16
and trained fp32 weights coexist; and the numbers are those of DDP.
"""

import warnings
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.utils import is_accelerate_available

from xformer_mllm.model.modeling_xformer import FROZEN

ACCELERATE = "1.15.0"


def plan(model: Any, plugin: Any, device: torch.device) -> None:
    """Fill in accelerate's FSDP plugin before it prepares `model`.

    Raises ValueError for FSDP 1, which cannot hold two dtypes in one unit, for loading by one process only, and for an older
    accelerate, which shards scalars and converts frozen weights to fp32.
    """
    if not is_accelerate_available(ACCELERATE):
        raise ValueError(f"FSDP needs accelerate {ACCELERATE} or newer: pip install --upgrade accelerate")
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP: only its second version can hold this model; set fsdp_version: 2 in the configuration")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("FSDP: every process reads the weights; set fsdp_cpu_ram_efficient_loading: false")
    # It warns of outputs that must not be changed in place; none is.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(frozen_layers(model))
    # FSDP casts nothing: trained weights stay fp32 under autocast, as without FSDP.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    scalars = [p for p in model.parameters() if p.ndim == 0]  # the temperature: FSDP does not shard scalars
    for scalar in scalars:
        scalar.data = scalar.data.to(device)
        scalar.register_post_accumulate_grad_hook(_average)
    plugin.ignored_modules = [nn.ParameterList(scalars)]


def frozen_layers(model: nn.Module) -> set[str]:
    """The classes of the layers that the frozen parts are stacks of."""
    return {
        type(layer).__name__
        for name, part in model.named_modules()
        if name.rpartition(".")[2] in FROZEN
        for stack in part.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
    }


def keep_tied_weights(model: Any) -> None:
    """Keep the word embeddings gathered after use: ITG's head reads their weight directly."""
    words = model.get_input_embeddings()
    if isinstance(words, FSDPModule):
        words.set_reshard_after_forward(False)


def _average(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    distributed.all_reduce(parameter.grad)
    parameter.grad.div_(distributed.get_world_size())
