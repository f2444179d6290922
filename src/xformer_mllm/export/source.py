"""The model as it is: what kind it is, and what its folder holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from xformer_mllm.files import read_json
from xformer_mllm.model.modeling_xformer import XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.model.processing_xformer import XFormerProcessor

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A class that can be exported: the Auto class that loads it, the hub's name of its task, its words in the card."""

    model: type[PreTrainedModel]
    auto_class: str
    task: str
    title: str
    example: str


KINDS = {
    kind.model.__name__: kind
    for kind in (
        Kind(
            XFormerForPreTraining,
            "AutoModelForPreTraining",
            "feature-extraction",
            "stage 1, before it meets a language model",
            """\
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor

name = {name}
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
inputs = processor(images="image.png")

model = AutoModel.from_pretrained(name, trust_remote_code=True)  # without the heads of stage 1
features = model(**inputs)
print(features.fused_queries.shape, features.clip_tokens.shape)

model = AutoModelForPreTraining.from_pretrained(name, trust_remote_code=True)
ids = model.caption(inputs["pixel_values"], processor.qformer_tokenizer.sep_token_id)
print(processor.qformer_tokenizer.batch_decode(ids, skip_special_tokens=True))""",
        ),
        Kind(
            XFormerForConditionalGeneration,
            "AutoModelForImageTextToText",
            "image-text-to-text",
            "stage 2, in front of a frozen language model",
            """\
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

name = {name}
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
inputs = processor(images="image.png", text={prompt})
ids = model.generate(**inputs, max_new_tokens=20)
print(processor.batch_decode(ids, skip_special_tokens=True))

pipe = pipeline("image-text-to-text", model=name, trust_remote_code=True)
print(pipe(images="image.png", text={prompt}, max_new_tokens=20))""",
        ),
    )
}


def kind_of(folder: Path) -> Kind:
    """Raises ValueError if the folder holds another kind of model."""
    name = next(iter(read_json(folder / "config.json").get("architectures") or []), "unknown")
    if name not in KINDS:
        raise ValueError(f"{folder}: holds a model of kind {name}; what can be exported: {' or '.join(KINDS)}")
    return KINDS[name]


def open_weights(folder: Path) -> Tensors:
    """Name -> tensor, mapped from its file and read when it is used. Raises OSError or ValueError."""
    index = folder / "model.safetensors.index.json"
    files = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder}: its weights are not there ({file} is missing)")
        try:
            opened = safe_open(folder / file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: damaged or cut short ({error}); copy it again") from error
        tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def open_processor(folder: Path) -> XFormerProcessor:
    """Raises FileNotFoundError if there is none beside the model."""
    if not (folder / "processor_config.json").is_file():
        raise FileNotFoundError(f"{folder}: has no processor (processor_config.json); save it beside the model")
    return XFormerProcessor.from_pretrained(folder)


def part_of(name: str) -> str:
    """'xformer.mae_encoder.layers.0…' -> 'mae_encoder'."""
    return name.removeprefix("xformer.").split(".")[0]
