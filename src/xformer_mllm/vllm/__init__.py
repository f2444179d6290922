"""X-Former in vLLM: `vllm serve FOLDER` and `vllm.LLM(FOLDER)` take a stage-2 model once the package is installed.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`); the model is imported when it is used.
"""


def register() -> None:
    """Tell transformers and vLLM about X-Former."""
    from vllm import ModelRegistry

    import xformer_mllm  # noqa: F401  # its configuration and processor, for transformers' Auto classes

    ModelRegistry.register_model(
        "XFormerForConditionalGeneration", "xformer_mllm.vllm.model:XFormerForConditionalGeneration"
    )
