"""X-Former (ECCV 2024): CLIP and MAE features, unified for multimodal LLMs.

    from xformer_mllm import XFormerForConditionalGeneration, XFormerProcessor

Importing the package registers X-Former with transformers' Auto classes, so `AutoModelForImageTextToText` and the
`image-text-to-text` pipeline know its checkpoints.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoProcessor,
)

from xformer_mllm.attach import attach_xformer, detach_xformer
from xformer_mllm.defaults import shipped_model
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import (
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    XFormerForPreTraining,
    XFormerModel,
)
from xformer_mllm.model.processing_xformer import XFormerProcessor
from xformer_mllm.variants import VARIANTS

AutoConfig.register("xformer", XFormerConfig)
AutoModel.register(XFormerConfig, XFormerModel)
AutoModelForPreTraining.register(XFormerConfig, XFormerForPreTraining)
AutoModelForImageTextToText.register(XFormerConfig, XFormerForConditionalGeneration)
AutoProcessor.register(XFormerConfig, XFormerProcessor)

__all__ = [
    "VARIANTS",
    "XFormerConfig",
    "XFormerForConditionalGeneration",
    "XFormerForImageTextRetrieval",
    "XFormerForPreTraining",
    "XFormerModel",
    "XFormerProcessor",
    "attach_xformer",
    "detach_xformer",
    "shipped_model",
]
