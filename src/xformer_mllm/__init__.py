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

from .attach import attach_xformer, detach_xformer
from .model.configuration_xformer import XFormerConfig
from .model.modeling_xformer import (
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    XFormerForPreTraining,
    XFormerModel,
)
from .model.processing_xformer import XFormerProcessor
from .variants import VARIANTS

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
]
