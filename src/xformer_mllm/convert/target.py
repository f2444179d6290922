"""What is made of the sources: the model, still empty, and its processor."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from xformer_mllm.convert.configuration import build_config, llm_tokenizer, qformer_tokenizer
from xformer_mllm.convert.pieces import Pieces, blip2_pieces, drop, grown
from xformer_mllm.convert.settings import ConvertConfig
from xformer_mllm.convert.sources import Sources
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import FROZEN, XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.model.processing_xformer import XFormerProcessor, image_processor


@dataclass(frozen=True)
class Target:
    """What is made, and of what.

    dtype: of the frozen parts. model: on the meta device. pieces, tower_pieces: the Q-Former's and the tower's, by
    transformers' names of BLIP-2. wanted: our names of all that is saved, on the meta device in the dtype it is saved in.
    """

    settings: ConvertConfig
    sources: Sources
    dtype: torch.dtype
    model: PreTrainedModel
    processor: XFormerProcessor
    pieces: Pieces
    tower_pieces: Pieces
    wanted: dict[str, torch.Tensor]

    @property
    def config(self) -> XFormerConfig:
        return self.model.config

    @property
    def stage2(self) -> bool:
        return self.sources.llm is not None


def build_target(settings: ConvertConfig, sources: Sources) -> Target:
    """The configuration, processor and empty model that the sources make. Raises ValueError where they cannot."""
    pieces = tower_pieces = blip2_pieces(sources.qformer, sources.kind)
    if not sources.own_tower:
        tower_pieces = blip2_pieces(sources.tower, sources.tower_kind)
        drop(tower_pieces, r"(?!vision_model\.)", "only the tower is taken from --clip")
    tokenizer = qformer_tokenizer(settings, sources)
    config = build_config(settings, sources, pieces, tower_pieces, tokenizer)
    images = image_processor(config.clip_config.image_size)
    kind: Any
    if sources.llm is None:
        kind, processor = XFormerForPreTraining, XFormerProcessor(images, tokenizer, tokenizer)
    else:
        texts, queries = llm_tokenizer(sources.llm), config.num_query_tokens
        kind, processor = XFormerForConditionalGeneration, XFormerProcessor(images, texts, tokenizer, queries)
        config.image_token_index = processor.image_token_id
    with torch.device("meta"):
        model = kind(config)
    if sources.kind == "bert":  # [DEC] is new to its vocabulary
        for name, deviation in (("embeddings.word_embeddings.weight", config.initializer_range), ("itg_bias", 0.0)):
            if name in pieces:
                pieces[name] = grown(pieces[name], config.qformer_config.vocab_size, deviation)
    dtype = getattr(torch, settings.dtype)
    return Target(settings, sources, dtype, model, processor, pieces, tower_pieces, _wanted(model, dtype))


def _wanted(model: PreTrainedModel, frozen: torch.dtype) -> dict[str, torch.Tensor]:
    """All that is saved, on the meta device; `frozen`: the frozen parts' dtype."""
    wanted = {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            dtype = frozen if part_of(name) in FROZEN else torch.float32
            wanted[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return wanted


def part_of(name: str) -> str:
    """The part of the model that one of our names is in, as the printed table has it."""
    name = name.removeprefix("xformer.")
    if re.match(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.", name):
        return "qformer (text)"
    return name.split(".")[0]
