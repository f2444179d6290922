"""The new model's folder: configuration, processor, and weights tensor by tensor, never more than a shard in memory."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from xformer_mllm.convert.plan import Plan
from xformer_mllm.convert.target import Target
from xformer_mllm.files import write_whole

SHARD_BYTES = 2 * 1024**3


def write_model(folder: Path, plan: Plan, target: Target) -> None:
    """Write all that `from_pretrained` needs; the language model, which is in memory, is let go of.

    Raises OSError, before any weight is written if there is no room for them.
    """
    target.config.architectures = [type(target.model).__name__]
    target.config.save_pretrained(folder)
    target.processor.save_pretrained(folder)
    if target.stage2:
        generation_settings(plan, target).save_pretrained(folder)
    size, free = sum(tensor.nbytes for tensor in target.wanted.values()), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{folder.parent}: the model needs {size / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free")
    write_weights(folder, plan, target)
    if target.sources.llm is not None:
        target.sources.llm.let_go()


def write_weights(folder: Path, plan: Plan, target: Target) -> None:
    """Safetensors shards, and their index where there is more than one."""
    new = initialised(target.model, plan.fresh, target.settings.seed)
    shards = split_torch_state_dict_into_shards(target.wanted, max_shard_size=SHARD_BYTES)
    for file, names in shards.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = plan.copied[name].tensor() if name in plan.copied else new[name]
            tensors[name] = tensor.detach().to(target.wanted[name].dtype, copy=True).contiguous()
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder.parent}: the weights could not be written ({error})") from None
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody else read it
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def initialised(model: PreTrainedModel, names: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """Tensors of a model on the meta device, drawn as its own `_init_weights` does; the others stay there."""
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
    """The language model's; behind a BLIP-2's projection a text ends where BLIP-2's do, at the end of its line."""
    llm, qformer = target.sources.llm, target.sources.qformer
    assert llm is not None
    assert llm.folder is not None
    settings = GenerationConfig.from_model_config(llm.config)
    if (llm.folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(llm.folder)
    if "language_projection.weight" in plan.copied:
        if target.sources.kind == "blip-2":
            settings.eos_token_id = qformer.config.text_config.eos_token_id
        elif newline := target.processor.tokenizer("\n", add_special_tokens=False)["input_ids"]:  # LAVIS blip2_opt.py
            settings.eos_token_id = newline[0]
    return settings
