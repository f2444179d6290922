"""X-Former (ECCV 2024): CLIP and MAE features unified for multimodal language models.

    from xformer_mllm import XFormerForConditionalGeneration, XFormerProcessor

After `import xformer_mllm`, transformers' Auto classes and pipelines know X-Former's checkpoints. Nothing heavy is
imported before it is needed: public names load on first use, and X-Former registers itself with transformers when
transformers is imported.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "VARIANTS": "variants",
    "XFormerConfig": "model.configuration_xformer",
    "XFormerForConditionalGeneration": "model.modeling_xformer",
    "XFormerForImageTextRetrieval": "model.modeling_xformer",
    "XFormerForPreTraining": "model.modeling_xformer",
    "XFormerModel": "model.modeling_xformer",
    "XFormerProcessor": "model.processing_xformer",
    "attach_xformer": "attach",
    "detach_xformer": "attach",
    "shipped_model": "defaults",
}
"""Public name -> the module that defines it."""

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register_auto_classes()
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_auto_classes() -> None:
    """Make transformers' Auto classes know X-Former; importing the package and a public name, or transformers, does it."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForPreTraining, AutoProcessor

    from xformer_mllm.model import modeling_xformer as modeling
    from xformer_mllm.model.configuration_xformer import XFormerConfig
    from xformer_mllm.model.processing_xformer import XFormerProcessor

    AutoConfig.register("xformer", XFormerConfig, exist_ok=True)
    AutoModel.register(XFormerConfig, modeling.XFormerModel, exist_ok=True)
    AutoModelForPreTraining.register(XFormerConfig, modeling.XFormerForPreTraining, exist_ok=True)
    AutoModelForImageTextToText.register(XFormerConfig, modeling.XFormerForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(XFormerConfig, XFormerProcessor, exist_ok=True)


class _RegisterWithTransformers:
    """Finds transformers as Python does, and registers X-Former once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                register_auto_classes()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    register_auto_classes()
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())  # type: ignore[arg-type]
