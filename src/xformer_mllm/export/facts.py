"""A model's files, and what the card states about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from xformer_mllm.checkpoints import evaluation_folder, model_folder
from xformer_mllm.commands import ExportConfig
from xformer_mllm.files import read_json
from xformer_mllm.language_models import SMOLLM2_ON_HUB
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.model.processing_xformer import XFormerProcessor

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A class that can be exported: the Auto class that loads it, its task on the Hub, its texts for the card."""

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
            "stage 1, without a language model",
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
answer = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True))

pipe = pipeline("image-text-to-text", model=name, trust_remote_code=True)
print(pipe(images="image.png", text={prompt}, max_new_tokens=20))""",
        ),
    )
}


def kind_of(folder: Path) -> Kind:
    """Return the kind of model in a folder. Raises ValueError if it cannot be exported."""
    name = next(iter(read_json(folder / "config.json").get("architectures") or []), "unknown")
    if name not in KINDS:
        raise ValueError(f"{folder}: holds a model of kind {name}; expected {' or '.join(KINDS)}")
    return KINDS[name]


def open_weights(folder: Path) -> Tensors:
    """Return the tensors, mapped from their files and read when used. Raises OSError or ValueError."""
    index = folder / "model.safetensors.index.json"
    files = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder}: the weight file {file} is missing")
        try:
            tensors |= load_file(folder / file)
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: damaged or cut short ({error}); copy it again") from error
    return tensors


def open_processor(folder: Path) -> XFormerProcessor:
    """Load the model's processor. Raises FileNotFoundError if there is none."""
    if not (folder / "processor_config.json").is_file():
        raise FileNotFoundError(f"{folder}: has no processor_config.json; save the processor in the model's folder")
    return XFormerProcessor.from_pretrained(folder)


def part_of(name: str) -> str:
    """Return the part of the model: 'xformer.mae_encoder.layers.0…' -> 'mae_encoder'."""
    return name.removeprefix("xformer.").split(".")[0]


# Names of --llm that are not on the Hub -> description, licence.
KNOWN = {"opt": ("the tiny OPT of xformer-mllm", "apache-2.0"), "smollm2": (SMOLLM2_ON_HUB, "apache-2.0")}

Metrics = Mapping[str, Any]  # content of an evaluation's metrics.json


@dataclass(frozen=True)
class Facts:
    """Everything the card states.

    wanted: the model's tensors on the meta device, in the dtype they are written in. runs: settings of the runs and
    conversions that made it, the last one first. bases: names of base models -> licence, None if unknown.
    """

    settings: ExportConfig
    kind: Kind
    config: XFormerConfig
    wanted: Tensors
    runs: list[dict[str, Any]]
    bases: dict[str, str | None]
    scores: list[Metrics]

    @property
    def name(self) -> str:
        return self.settings.repo_id or self.settings.output_dir.resolve().name

    @property
    def settled(self) -> bool:
        """Whether a licence was chosen and those of all named parts are known."""
        settings = self.settings
        return (settings.license != "other" or settings.license_name is not None) and None not in self.bases.values()

    @property
    def gigabytes(self) -> float:
        return sum(tensor.nbytes for tensor in self.wanted.values()) / 1e9


def lineage(folder: Path) -> list[dict[str, Any]]:
    """Return the settings of the run or conversion that made the model, and of those it started from.

    Folders that no longer exist are skipped. Each entry has its "command".
    """
    found = []
    run: dict[str, Any] = {}
    if folder.name == "model" and (folder.parent / "config.json").is_file():
        run = read_json(folder.parent / "config.json")
        found.append(run)
    if (folder / "conversion.json").is_file():
        found.append({"command": "convert"} | read_json(folder / "conversion.json")["settings"])
    start = run.get("from_pretraining")
    try:
        return found + (lineage(model_folder(Path(start))) if start else [])
    except FileNotFoundError:
        return found


def made_from(runs: list[dict[str, Any]], given: tuple[str, ...]) -> dict[str, str | None]:
    """Return the names of the base models -> licence, None if unknown."""
    found: dict[str, str | None] = {}
    for run in runs:
        for name in filter(None, (run.get(key) for key in ("qformer", "clip", "mae", "llm"))):
            known, licence = KNOWN.get(name, (without_folders(name), None))
            found.setdefault(known, licence)
    return found | dict(named.split("=", 1) for named in given)


def without_folders(value: Any) -> Any:
    """Reduce a path on this machine to its last part."""
    here = isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists())
    return Path(value).name if here else value


def evaluations(folder: Path, named: Sequence[Path]) -> tuple[list[Metrics], list[str]]:
    """Return the metrics of the model's evaluations, and a message for each one left out.

    Those in `named` are always included.
    """
    weights = max(file.stat().st_mtime for file in folder.glob("*.safetensors"))
    found, left_out = [read_metrics(file) for file in named], []
    for file in sorted(evaluation_folder(folder).glob("*/metrics.json")):
        if file.resolve() in (other.resolve() for other in named):
            continue
        if file.stat().st_mtime < weights:
            left_out.append(f"{file}, which is older than the weights")
        else:
            found.append(read_metrics(file))
    return found, left_out


def read_metrics(file: Path) -> Metrics:
    """Read a metrics.json. Raises OSError or ValueError if it is not one."""
    metrics = read_json(file)
    if not isinstance(metrics, dict) or "all" not in metrics.get("scores", {}):
        raise ValueError(f"{file}: holds no scores; expected the metrics.json of an evaluation")
    return metrics


def benchmark_of(metrics: Metrics) -> tuple[str, str]:
    """Return the benchmark's name and split."""
    config = metrics.get("config", {})
    return metrics.get("benchmark") or config.get("data") or "unnamed", config.get("split") or ""


def title_of(metrics: Metrics) -> str:
    """Return a title such as 'vqav2 val', marked if the scores are on the embedded scenes in a benchmark's format."""
    title = " ".join(filter(None, benchmark_of(metrics)))
    return f"{title}: the embedded scenes in its format" if metrics.get("exported_scenes") else title
