"""X-Former as a vLLM model: our encoders, Q-Former and fusion before any causal language model that vLLM has.

vLLM tokenizes the prompt, and processes and caches images apart from it. Both are put right in `XFormerMultiModalProcessor`:
the prompt becomes XFormerProcessor's, and where the queries read the question, it is part of what an image is cached by.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from xformer_mllm.model import masks
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import XFormerModel
from xformer_mllm.model.processing_xformer import XFormerProcessor

PREFIX = "xformer."


class XFormerProcessingInfo(BaseProcessingInfo):
    """One image for each prompt."""

    def get_hf_config(self) -> XFormerConfig:
        return self.ctx.get_hf_config(XFormerConfig)

    def get_hf_processor(self, **kwargs: object) -> XFormerProcessor:
        return self.ctx.get_hf_processor(XFormerProcessor)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().num_query_tokens}


class XFormerDummyInputsBuilder(BaseDummyInputsBuilder[XFormerProcessingInfo]):
    """What vLLM measures its memory with at the start."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> dict:
        side = self.info.get_hf_config().clip_config.image_size
        return {"image": self._get_dummy_images(width=side, height=side, num_images=mm_counts.get("image", 0))}


class XFormerMultiModalProcessor(BaseMultiModalProcessor[XFormerProcessingInfo]):
    """XFormerProcessor's prompts and pixels, by vLLM's interface."""

    def apply(self, inputs, timing_ctx):
        """Replace the tokens of the plain prompt by XFormerProcessor's, with their placeholders; then as in every model."""
        processor = self.info.get_hf_processor()
        prompt = processor.tokenizer.decode(
            inputs.prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        inputs.prompt = processor.prompt_ids([prompt])[0]
        if (
            self.info.get_hf_config().instruction_aware
        ):  # a processor's argument is part of an image's key in all caches
            inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, "text": prompt}
        return super().apply(inputs, timing_ctx)

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
        return {name: MultiModalFieldConfig.batched("image") for name in names}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptReplacement]:
        placeholders = [self.info.get_hf_processor().image_token_id] * self.info.get_hf_config().num_query_tokens
        return [PromptReplacement(modality="image", target=placeholders, replacement=placeholders)]


@MULTIMODAL_REGISTRY.register_processor(
    XFormerMultiModalProcessor, info=XFormerProcessingInfo, dummy_inputs=XFormerDummyInputsBuilder
)
class XFormerForConditionalGeneration(nn.Module, SupportsMultiModal):
    """The weights and names of `model.XFormerForConditionalGeneration`; the language model is vLLM's.

    Trained parts stay fp32, as everywhere; encoders and language model have vLLM's `dtype`. Every process of a
    tensor-parallel group has its own encoders.

    Raises:
        ValueError: for an encoder-decoder and for a model with LoRA adapters.
    """

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None  # `apply` inserts them

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.dtype = vllm_config.model_config.dtype
        check(config)
        with self._mark_tower_model(vllm_config, "image"):
            self.xformer = XFormerModel(config)
            self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_projection.float().requires_grad_(False)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text_config.model_type]],
            )
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_index])

    def embed_multimodal(
        self,
        pixel_values: torch.Tensor | None = None,
        qformer_input_ids: Sequence[torch.Tensor] | None = None,
        qformer_attention_mask: Sequence[torch.Tensor] = (),
        **kwargs: object,
    ) -> torch.Tensor | list:
        """Pixels uint8[B, 3, H, W], and each image's prompt for queries that read it -> soft prompts [B, Q, E]."""
        if pixel_values is None:
            return []
        image = self.xformer.encode_image(pixel_values)
        if qformer_input_ids is None:
            output = self.xformer.read(image)
        else:
            ids = pad_sequence(list(qformer_input_ids), batch_first=True)
            mask = pad_sequence(list(qformer_attention_mask), batch_first=True)
            mask = masks.bidirectional_mask(mask, self.config.num_query_tokens)
            output = self.xformer.read(image, ids, mask, queries_only=True)
        return self.language_projection(output.fused_queries)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs: object):
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the file's weights; transformers knows what its towers' weights were called when they were saved."""
        own, others = {}, []
        for name, weight in weights:
            if name.startswith(PREFIX):
                own[name.removeprefix(PREFIX)] = weight
            else:
                others.append((name, weight))
        self.xformer, found = XFormerModel.from_pretrained(
            None, config=self.config, state_dict=own, dtype=self.dtype, output_loading_info=True
        )
        if found["missing_keys"]:
            raise ValueError(f"the file has no weights {', '.join(sorted(found['missing_keys']))}")
        # Without gradients: vLLM measures its memory with as many images as it could ever encode at once.
        self.xformer.requires_grad_(False).eval().to(self.language_projection.weight.device)
        loaded = {PREFIX + name for name, _ in self.xformer.named_parameters()}
        return loaded | AutoWeightsLoader(self).load_weights(others)


def check(config: XFormerConfig) -> None:
    """Refuse what vLLM cannot run."""
    if config.text_config.is_encoder_decoder:
        raise ValueError(f"vLLM has no encoder-decoder such as {config.text_config.model_type}; use xformer serve")
    if config.lora_rank:
        raise ValueError("this model has LoRA adapters, which vLLM would not find; use xformer serve")
