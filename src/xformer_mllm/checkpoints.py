"""Assemble and load models: the start of each stage from its parts, and trained models for inference.

A tensor that the model has and a part lacks is an error.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTMAEForPreTraining,
)

from xformer_mllm.files import write_whole
from xformer_mllm.language_models import chat_turn, check_positions, end_tokens, language_model_dir
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import (
    FROZEN,
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    XFormerForPreTraining,
    XFormerModel,
    XFormerPreTrainedModel,
    add_lora,
    language_model_class,
    without_dropout,
)
from xformer_mllm.model.processing_xformer import XFormerProcessor
from xformer_mllm.variants import variant_config

logger = logging.getLogger(__name__)

STAGES = {
    XFormerForPreTraining.__name__: "stage-1",
    XFormerForConditionalGeneration.__name__: "stage-2",
    XFormerForImageTextRetrieval.__name__: "retrieval",
}
"""Names of the model classes in messages."""


def copy_weights(source: dict[str, torch.Tensor], target: nn.Module, name: str) -> None:
    """Load every tensor of `target` from `source`, which may have more.

    Raises:
        ValueError: names the first tensor that `source` lacks or has in another shape.
    """
    wanted = target.state_dict()
    for key, tensor in wanted.items():
        if key not in source:
            raise ValueError(f"{name}: the checkpoint has no tensor '{key}'")
        if source[key].shape != tensor.shape:
            raise ValueError(
                f"{name}: '{key}' is {tuple(source[key].shape)} in the checkpoint, the model needs {tuple(tensor.shape)}"
            )
    target.load_state_dict({key: source[key] for key in wanted})
    logger.info("%s: %d tensors loaded, %d not needed", name, len(wanted), len(source) - len(wanted))


def continue_pretraining(folder: Path, variant: str) -> tuple[XFormerForPreTraining, XFormerProcessor]:
    """Load a model made by `xformer convert`, or trained before, to start stage 1.

    Args:
        folder: of the model or of its run.
        variant: expected variant.

    Raises:
        FileNotFoundError, ValueError: if there is no such model, or one of another kind or variant.
    """
    folder = model_folder(folder)
    config = XFormerConfig.from_pretrained(folder)
    if config.architectures != [XFormerForPreTraining.__name__]:
        raise ValueError(f"{folder}: holds {config.architectures}, not the start of stage 1; convert without --llm")
    fields = ("fusion", "reconstruction", "clip_shallow_layer", "reconstruction_in_stage2")
    asked = variant_config(variant, config)
    if different := [name for name in fields if getattr(asked, name) != getattr(config, name)]:
        raise ValueError(f"{folder}: is not of the variant {variant} (other {', '.join(different)}); convert it again")
    model = XFormerForPreTraining.from_pretrained(folder, attn_implementation=attention_for_device())
    return model, XFormerProcessor.from_pretrained(folder)


def load_second_encoder(model: Any, source: str | Path) -> None:
    if not model.config.has_mae:
        tower = type(model.mae_encoder).from_pretrained(source)  # for a whole CLIP or SigLIP, its vision tower
        copy_weights(tower.state_dict(), model.mae_encoder, "second encoder")
        return
    mae = ViTMAEForPreTraining.from_pretrained(source)
    copy_weights(mae.vit.state_dict(), model.mae_encoder, "MAE encoder")
    if model.mae_decoder is not None:
        copy_weights(mae.decoder.state_dict(), model.mae_decoder, "MAE decoder")


def attention_for_device() -> str:
    """Return sdpa on a GPU; eager on a CPU, where bf16 sdpa trains five times slower (docs/decisions/model.md)."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def bf16_is_fast() -> bool:
    """Whether the hardware multiplies bf16: GPUs that support it, CPUs with AMX or AVX-512 BF16; others emulate it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def check_language_model(name: str, config: Any) -> None:
    """Raise ValueError if the configuration is neither a causal language model's nor an encoder-decoder's."""
    kinds = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in kinds:
        raise ValueError(f"{name}: a {config.model_type} is not a language model")


def load_language_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen language model, causal or encoder-decoder, without dropout, and its tokenizer.

    Args:
        name: "opt" (the shipped tiny one), "smollm2", a directory or a Hub id. fp16 weights are loaded in bf16.

    Raises:
        ValueError, FileNotFoundError: if there is no such language model.
    """
    source = language_model_dir(name)
    config = without_dropout(AutoConfig.from_pretrained(source))
    check_language_model(name, config)
    # Under bf16 autocast every fp16 weight would be cast in every step, and the casts kept for the backward pass.
    dtype = torch.bfloat16 if config.dtype == torch.float16 else "auto"
    model = language_model_class(config).from_pretrained(
        source, config=config, dtype=dtype, attn_implementation=attention_for_device()
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.requires_grad_(False), tokenizer


def start_generation(
    pretrained: str | Path,
    llm: str = "opt",
    seed: int = 0,
    instruction_aware: bool = False,
    chat_template: bool = False,
    lora_rank: int = 0,
) -> tuple[XFormerForConditionalGeneration, XFormerProcessor]:
    """Combine stage 1's model with a language model: the start of stage 2 (paper section "Stage 2").

    Unless it is instruction-aware, the Q-Former drops its text feed-forwards and word embeddings, as in BLIP-2.

    Args:
        pretrained: directory of a saved `XFormerForPreTraining` with its processor; or of `xformer convert --llm`, which
            already has a language model and a projection: `llm` and `seed` are then ignored.
        llm: as `load_language_model` takes it.
        seed: of the new projection and adapters.
        instruction_aware: whether the queries also read the prompt (InstructBLIP).
        chat_template: whether to use the language model's chat template.
        lora_rank: rank of the LoRA adapters on the language model; 0 for none, as in the paper.

    Raises:
        ValueError, FileNotFoundError: if there is no such language model, or it has no chat template.
        ModuleNotFoundError: if adapters are requested and peft is not installed.
    """
    processor = XFormerProcessor.from_pretrained(pretrained)
    if XFormerConfig.from_pretrained(pretrained).architectures == [XFormerForConditionalGeneration.__name__]:
        if instruction_aware or chat_template:
            raise ValueError(
                f"{pretrained}: its prompt format is fixed; leave out --chat-template and pass --no-instruction-aware"
            )
        whole = XFormerForConditionalGeneration.from_pretrained(pretrained, attn_implementation=attention_for_device())
        without_dropout(whole.config.text_config)
        if lora_rank:
            add_lora(whole.language_model, lora_rank)
            whole.config.lora_rank = lora_rank
        return whole, processor
    first = XFormerForPreTraining.from_pretrained(pretrained)
    language_model, tokenizer = load_language_model(llm)
    check_positions(llm, language_model.config, first.config.num_query_tokens)
    turn = configure_chat(language_model, tokenizer, chat_template)
    processor = XFormerProcessor(
        processor.image_processor,
        tokenizer,
        processor.qformer_tokenizer,
        first.config.num_query_tokens,
        instruction_aware,
        language_model.config.is_encoder_decoder,
        turn,
    )

    config = first.config
    config.text_config = language_model.config
    config.image_token_index = processor.image_token_id
    config.qformer_config.use_qformer_text_input = config.instruction_aware = instruction_aware
    config._attn_implementation = attention_for_device()
    config.qformer_config.dtype = torch.float32  # trained, whatever the frozen parts' dtype
    with torch.device("meta"):  # the parts are loaded below; nothing large is initialised twice
        model = XFormerForConditionalGeneration(config)
    torch.manual_seed(seed)
    model.xformer = XFormerModel(config)
    copy_weights(first.xformer.state_dict(), model.xformer, "stage 1")
    model.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
    nn.init.normal_(model.language_projection.weight, std=config.initializer_range)
    nn.init.zeros_(model.language_projection.bias)
    model.language_model = language_model
    for name, part in model.xformer.named_children():
        if name in FROZEN:  # one dtype for all frozen parts
            part.to(language_model.dtype)
    if lora_rank:
        add_lora(language_model, lora_rank)
        config.lora_rank = lora_rank
    model.generation_config = language_model.generation_config
    return model, processor


def configure_chat(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> list[str] | None:
    """Return the chat template's turn, if requested, and set the generation settings' end and padding tokens.

    Training appends the first eos_token_id to the target text.
    """
    settings, turn = language_model.generation_config, None
    ends = end_tokens(tokenizer, settings.eos_token_id)
    if chat_template:
        turn, end = chat_turn(tokenizer)
        ends = [end, *(token for token in ends if token != end)]
    settings.eos_token_id = ends[0] if len(ends) == 1 else ends
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return turn


def model_folder(folder: Path) -> Path:
    """The folder of a model: the given one, or `model/` in the folder of a run.

    Raises:
        FileNotFoundError: if there is no model; the message names the runs up to two levels below.
    """
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if (folder / "config.json").is_file():
        return folder
    below = [
        file.parents[1] for pattern in ("*", "*/*") for file in sorted(folder.glob(f"{pattern}/model/config.json"))
    ]
    if below:
        raise FileNotFoundError(
            f"{folder}: not a model, but a folder of runs; name one: {', '.join(map(str, below[:6]))}"
        )
    raise FileNotFoundError(
        f"{folder}: no trained model; name the folder of a run (with model/ in it) or of a model (with config.json in it)"
    )


def model_name(folder: Path) -> str:
    """A model's name: that of its folder, or of its run's. Raises as `model_folder`."""
    place = model_folder(folder).resolve()
    return place.parent.name if place.name == "model" else place.name


def evaluation_folder(folder: Path) -> Path:
    """The folder of a model's evaluations: in its run's folder, or in its own where it is not `model/` of a run.

    Args:
        folder: as returned by `model_folder`.
    """
    if folder.name in ("", ".."):  # the current folder, or one above it
        folder = Path(os.path.abspath(folder))
    return (folder.parent if folder.name == "model" else folder) / "evaluation"


def load_model(
    folder: Path, kinds: Sequence[type[XFormerPreTrainedModel]], attention: str | None = None
) -> tuple[Any, XFormerProcessor]:
    """Load a trained model in evaluation mode, on the GPU if there is one, and its processor.

    Args:
        folder: of the model or of its run.
        kinds: accepted classes.
        attention: implementation; None for transformers' choice.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if the model is none of `kinds`.
    """
    folder = model_folder(folder)
    names = {kind.__name__: kind for kind in kinds}
    name = next(iter(XFormerConfig.from_pretrained(folder).architectures or []), "unknown")
    if name not in names:
        found = f"a {STAGES[name]} model" if name in STAGES else f"a model of kind {name}"
        needed = " or ".join(f"a {STAGES[kind]}" for kind in names)
        raise ValueError(f"{folder}: holds {found}; this needs {needed} one")
    model = names[name].from_pretrained(folder, attn_implementation=attention).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), XFormerProcessor.from_pretrained(folder)


def write_weights(
    folder: Path,
    wanted: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int | str,
) -> None:
    """Write safetensors shards, and an index if there are several, with at most one shard in memory.

    Args:
        folder: has config.json already.
        wanted: name -> tensor on the meta device, in the dtype it is saved in.
        read: name -> its values, in any dtype.
        max_shard_size: in bytes, or as "5GB"; a larger tensor gets its own file.

    Raises:
        OSError: if the disk has too little space, before anything is written; or if writing fails.
    """
    size, free = sum(tensor.nbytes for tensor in wanted.values()) / 1e9, shutil.disk_usage(folder).free / 1e9
    if size > free:
        raise OSError(f"the weights take {size:,.3f} GB, and {free:,.3f} GB are free at {folder.parent}")
    split = split_torch_state_dict_into_shards(dict(wanted), max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        # Copies, because safetensors refuses tensors that share memory.
        shard = {name: read(name).detach().to(wanted[name].dtype, copy=True).contiguous() for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"the weights could not be written at {folder.parent} ({error})") from None
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes it private to its owner
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
