"""`xformer export`: a model -> one folder with all that it needs, for the hub and for who has transformers alone.

    weights     safetensors shards, frozen parts included, tensor by tensor: never more than a shard in memory
    code        the modules of `model/` that the Auto classes need; transformers runs them with trust_remote_code=True
    settings    configuration, processor, generation settings
    README.md   the model card: how to use it, what is in it, scores, data, licence, citation

The folder appears whole or not at all.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from huggingface_hub import EvalResult, ModelCardData, split_torch_state_dict_into_shards
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from .checkpoints import model_folder
from .data.json_files import read_json, write_whole
from .data.questions import QUESTION_PROMPT
from .language_models import SMOLLM2_ON_HUB
from .model.configuration_xformer import XFormerConfig
from .model.modeling_xformer import FROZEN, LORA, XFormerForConditionalGeneration, XFormerForPreTraining
from .model.processing_xformer import XFormerProcessor
from .report.benchmark import UNSCALED, decoding, number
from .report.contents import BLIND

MODEL_CODE = Path(__file__).parent / "model"

# What --llm may be called, where that is no name on the hub -> what it is, its licence.
KNOWN = {"opt": ("the tiny OPT of xformer-mllm", "apache-2.0"), "smollm2": (SMOLLM2_ON_HUB, "apache-2.0")}

Tensors = Mapping[str, torch.Tensor]
Metrics = Mapping[str, Any]  # what metrics.json of an evaluation holds


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Make a self-contained folder of a model, with a model card: ready for the hub, and for transformers alone."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or of its model."""
    output_dir: Path
    """The new folder; must not exist yet, or be empty."""
    max_shard_size: str = "5GB"
    """At most so much in one file of weights (a larger tensor has a file of its own)."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the frozen parts, in place of the one that they have; what is trained stays as it is."""
    repo_id: str | None = None
    """The model's name on the hub (you/xformer-opt-2.7b), for the card; by default the new folder's name."""
    license: str = "other"
    """Of the whole, frozen parts included, as the hub names it (apache-2.0, cc-by-nc-4.0, ...): yours to choose."""
    license_name: str | None = None
    """What the licence is called, where --license is other."""
    license_link: str | None = None
    """Where it can be read, where --license is other."""
    base_models: tuple[str, ...] = ()
    """What the model was made from, each with its licence: facebook/opt-2.7b=other facebook/vit-mae-huge=cc-by-nc-4.0.
    Names are found beside the model where they can be; licences are not."""
    datasets: tuple[str, ...] = ()
    """What it was trained on, as the hub names it."""
    metrics: tuple[Path, ...] = ()
    """metrics.json of evaluations; those in evaluation/ beside the model are found."""

    def __post_init__(self) -> None:
        """Raises ValueError, in one line, for settings that cannot be."""
        if self.repo_id is not None:
            validate_repo_id(self.repo_id)
        if self.license != "other" and (self.license_name or self.license_link):
            raise ValueError(f"--license-name and --license-link belong to --license other, not to {self.license}")
        for named in self.base_models:
            if not all(named.partition("=")[::2]):
                raise ValueError(f"--base-models {named}: give each name with its licence: NAME=LICENCE")


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
inputs = processor(images="picture.png")

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
inputs = processor(images="picture.png", text={prompt})
ids = model.generate(**inputs, max_new_tokens=20)
print(processor.batch_decode(ids, skip_special_tokens=True))

pipe = pipeline("image-text-to-text", model=name, trust_remote_code=True)
print(pipe(images="picture.png", text={prompt}, max_new_tokens=20))""",
        ),
    )
}


@dataclass(frozen=True)
class Facts:
    """All that the card says.

    name: the model's. wanted: its tensors on the meta device, in the dtype that they are written in. runs: settings of the
    runs and conversions that made it, the last one first. bases: what it was made from -> licence, None if not known.
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
        """Whether somebody has chosen a licence, and those of all named parts are known."""
        settings = self.settings
        return (settings.license != "other" or settings.license_name is not None) and None not in self.bases.values()

    @property
    def gigabytes(self) -> float:
        return sum(tensor.nbytes for tensor in self.wanted.values()) / 1e9


def export(settings: ExportConfig) -> Path:
    """Export and return the new folder.

    Raises ValueError or OSError, in one line, if there is no such model, if something is there already, or if the disk is
    full.
    """
    output = settings.output_dir
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: there is something already; name another --output-dir or remove it")
    folder = model_folder(settings.model)
    kind, tensors, processor = kind_of(folder), open_weights(folder), open_processor(folder)
    config = new_config(folder, kind)
    wanted = {name: tensor.to("meta", dtype_of(name, tensor, settings.dtype)) for name, tensor in tensors.items()}
    scores, left_out = evaluations(folder, settings.metrics)
    runs = lineage(folder)
    facts = Facts(settings, kind, config, wanted, runs, made_from(runs, settings.base_models), scores)

    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        write_settings(partial, folder, facts, processor)
        write_code(partial)
        write_whole(partial / "README.md", model_card(facts))
        write_weights(partial, facts, tensors)
        check_whole(partial, kind, folder)
        os.replace(partial, output)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{output} could not be written, and nothing is left of it: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(summary(facts, left_out))
    return output


# -- the model as it is ------------------------------------------------------------------------------------------------


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


# -- weights, settings, code -------------------------------------------------------------------------------------------


def dtype_of(name: str, tensor: torch.Tensor, frozen: str | None) -> torch.dtype:
    """That of a tensor in the new folder; `frozen`, if given, is that of the frozen parts."""
    is_frozen = part_of(name) in FROZEN and LORA not in name
    changes = frozen is not None and is_frozen and tensor.is_floating_point()
    return getattr(torch, str(frozen)) if changes else tensor.dtype


def write_weights(folder: Path, facts: Facts, tensors: Tensors) -> None:
    """Shards, and their index where there are several. Raises OSError, before it begins if there is no room."""
    split = split_torch_state_dict_into_shards(dict(facts.wanted), max_shard_size=facts.settings.max_shard_size)
    free = shutil.disk_usage(folder).free / 1e9
    if facts.gigabytes > free:
        raise OSError(f"the weights take {facts.gigabytes:,.3f} GB, and {free:,.3f} GB are free on that disk")
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].to(facts.wanted[name].dtype).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody else read it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def check_whole(folder: Path, kind: Kind, source: Path) -> None:
    """Load the new folder without its numbers. Raises ValueError for weights that are missing or of another shape."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers' own table of them
    try:
        _, report = kind.model.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)
    wrong = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} weights are missing or of another shape, such as {wrong[0]}")


def new_config(source: Path, kind: Kind) -> XFormerConfig:
    """The model's, which names its code, and no path of this machine."""
    config = XFormerConfig.from_pretrained(source)
    config.auto_map = {
        "AutoConfig": "configuration_xformer.XFormerConfig",
        "AutoModel": "modeling_xformer.XFormerModel",
        kind.auto_class: f"modeling_xformer.{kind.model.__name__}",
    }
    for part in filter(None, (config.clip_config, config.mae_config, config.text_config, config.qformer_config)):
        part._name_or_path = ""
    return config


def write_settings(folder: Path, source: Path, facts: Facts, processor: XFormerProcessor) -> None:
    """config.json, the processor's files, generation_config.json."""
    dtypes = {part_of(name): tensor.dtype for name, tensor in facts.wanted.items() if tensor.is_floating_point()}
    frozen = dtypes.get("language_model", dtypes["clip_encoder"])
    config = facts.config
    for part in filter(None, (config, config.clip_config, config.mae_config, config.text_config)):
        part.dtype = str(frozen).removeprefix("torch.")  # transformers loads all but the trained parts in it
    config.save_pretrained(folder)

    processor.auto_map = {"AutoProcessor": "processing_xformer.XFormerProcessor"}
    processor.save_pretrained(folder)
    for file in folder.rglob("tokenizer_config.json"):
        kept = read_json(file)
        for name in ("is_local", "local_files_only"):  # how it was loaded here
            kept.pop(name, None)
        write_whole(file, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def write_code(folder: Path) -> None:
    """The model's modules: those that transformers asks for, and all that they import of each other."""
    todo, done = ["configuration_xformer", "modeling_xformer", "processing_xformer"], set()
    while todo:
        module = todo.pop()
        if module not in done:
            done.add(module)
            code = followable((MODEL_CODE / f"{module}.py").read_text(encoding="utf-8"))
            note = f"# From xformer-mllm {version('xformer-mllm')}, Apache-2.0.\n"
            write_whole(folder / f"{module}.py", note + code)
            todo += re.findall(r"^from \.(\w+) import", code, re.MULTILINE)


def followable(code: str) -> str:
    """Each module of `from . import a, b` named once more in the one form in which transformers looks for files to copy.

    It reads lines such as `from .a import name` (dynamic_module_utils.py `get_relative_imports`).
    """

    def add(line: re.Match) -> str:
        return line[0] + "".join(f"\nfrom .{name.strip()} import __name__ as _" for name in line[1].split(","))

    return re.sub(r"^from \. import ([\w, ]+)$", add, code, flags=re.MULTILINE)


# -- what is beside the model ------------------------------------------------------------------------------------------


def lineage(folder: Path) -> list[dict[str, Any]]:
    """Settings of the run that trained the model, or of the conversion that made it, and of those that it began from.

    As far as their folders are still where they were; each has its "command".
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
    """What the model was made from -> its licence, None if that is not known."""
    found: dict[str, str | None] = {}
    for run in runs:
        for name in filter(None, (run.get(key) for key in ("qformer", "clip", "mae", "llm"))):
            known, licence = KNOWN.get(name, (without_folders(name), None))
            found.setdefault(known, licence)
    return found | dict(named.split("=", 1) for named in given)


def without_folders(value: Any) -> Any:
    """Of a path on this machine only the last part."""
    here = isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists())
    return Path(value).name if here else value


def evaluations(folder: Path, named: Sequence[Path]) -> tuple[list[Metrics], list[str]]:
    """What metrics.json of the model's evaluations hold, and a line for each that is not taken, with the reason.

    `xformer evaluate` writes them to evaluation/ beside the model's folder, where another model's may be, too; those that
    are `named` are taken in any case.
    """
    weights = max(file.stat().st_mtime for file in folder.glob("*.safetensors"))
    found, left_out = [read_metrics(file) for file in named], []
    for file in sorted(folder.parent.glob("evaluation/*/metrics.json")):
        metrics = read_metrics(file)
        model = metrics.get("config", {}).get("model", "")
        if file.resolve() in (other.resolve() for other in named):
            continue
        if folder.name not in ("model", Path(model).name):
            left_out.append(f"{file}, which is of {model}")
        elif file.stat().st_mtime < weights:
            left_out.append(f"{file}, which is older than the weights")
        else:
            found.append(metrics)
    return found, left_out


def read_metrics(file: Path) -> Metrics:
    """Raises OSError or ValueError, in one line, if that is no metrics.json."""
    metrics = read_json(file)
    if not isinstance(metrics, dict) or "all" not in metrics.get("scores", {}):
        raise ValueError(f"{file}: holds no scores; it should be the metrics.json of an evaluation")
    return metrics


def benchmark_of(metrics: Metrics) -> tuple[str, str]:
    """Its name and its split."""
    config = metrics.get("config", {})
    return metrics.get("benchmark") or config.get("data") or "unnamed", config.get("split") or ""


# -- the model card ----------------------------------------------------------------------------------------------------


def model_card(facts: Facts) -> str:
    """README.md: what the hub reads, in YAML, and what people read."""
    sections = [
        introduction(facts),
        usage(facts),
        contents(facts),
        training(facts),
        *(["## Scores", *map(scores_of, facts.scores)] if facts.scores else []),
        licence(facts),
        CITATION,
    ]
    return f"---\n{hub_fields(facts)}\n---\n\n" + "\n\n".join(sections) + "\n"


def hub_fields(facts: Facts) -> str:
    """The card's YAML."""
    settings, task = facts.settings, facts.kind.task
    data = ModelCardData(
        license=settings.license,
        license_name=settings.license_name,
        license_link=settings.license_link,
        library_name="transformers",
        pipeline_tag=task,
        base_model=[name for name in facts.bases if re.fullmatch(r"[\w.-]+/[\w.-]+", name)] or None,
        datasets=list(settings.datasets) or None,
        tags=["x-former", "q-former", "custom_code"],
        model_name=facts.name.rpartition("/")[2],
        eval_results=[result for metrics in facts.scores for result in hub_results(metrics, task)] or None,
    )
    return data.to_yaml()


def hub_results(metrics: Metrics, task: str) -> list[EvalResult]:
    """The overall scores."""
    name, split = benchmark_of(metrics)
    return [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            dataset_split=split or None,
            metric_type=metric,
            metric_value=round(value if metric in UNSCALED else 100 * value, 2),
        )
        for metric, value in metrics["scores"]["all"].items()
        if metric not in ("n", "ci95", *BLIND) and value is not None
    ]


def introduction(facts: Facts) -> str:
    return f"""\
# {facts.name}

X-Former ({facts.kind.title}): a frozen CLIP encoder keeps a picture's global meaning and loses local detail; a second
frozen encoder (a MAE, in the paper) keeps detail; a Q-Former and a dual cross-attention make one short sequence of both.
From [X-Former: Unifying Contrastive and Reconstruction Learning for MLLMs](https://arxiv.org/abs/2407.13851) (ECCV 2024), in
the open implementation xformer-mllm {version("xformer-mllm")}, which is not the authors'.

What it says can be wrong, and carries the biases of its frozen parts and of its training data."""


def usage(facts: Facts) -> str:
    needed = ", ".join(f"`{line}`" for line in requires("xformer-mllm") or [] if ";" not in line)
    prompt = QUESTION_PROMPT.format(question="How many objects are there in the image?")
    return f"""\
## Use

Needs {needed}. `trust_remote_code=True` runs the Python files of this folder: read them first.

```python
{facts.kind.example.format(name=json.dumps(facts.name), prompt=json.dumps(prompt))}
```"""


def contents(facts: Facts) -> str:
    """What the parts are, their sizes and dtypes."""
    config = facts.config
    what = {
        "clip_encoder": tower(config.clip_config),
        "mae_encoder": tower(config.mae_config),
        "qformer": tower(config.qformer_config),
        "query_tokens": f"{config.num_query_tokens} queries",
        "fusion": config.fusion.replace("_", " "),
        "language_model": tower(config.text_config),
    }
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in facts.wanted.items():
        parts.setdefault(part_of(name), []).append(tensor)
    rows = [
        [
            part,
            what.get(part, ""),
            f"{sum(tensor.numel() for tensor in tensors):,}",
            ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
            "frozen" if part in FROZEN else "trainable",
        ]
        for part, tensors in parts.items()
    ]
    total, side = sum(tensor.numel() for tensor in facts.wanted.values()), config.clip_config.image_size
    return f"""\
## What is in it

{table(["part", "", "weights", "dtype", ""], rows)}

{total:,} weights, {facts.gigabytes:,.3f} GB. Pictures of any size are scaled to {side} × {side} pixels."""


def tower(config: Any) -> str:
    """'vit_mae, 32 layers × 1280'."""
    return "" if config is None else f"{config.model_type}, {config.num_hidden_layers} layers × {config.hidden_size}"


def training(facts: Facts) -> str:
    """The data, and all settings of the runs and conversions."""
    parts = ["## Training"]
    if datasets := facts.settings.datasets:
        parts.append(f"Data: {', '.join(f'[{name}](https://huggingface.co/datasets/{name})' for name in datasets)}.")
    for run in facts.runs:
        shown = {key: without_folders(value) for key, value in run.items() if key != "command"}
        data = f" on `{shown['data']}`" if "data" in shown else ""
        content = json.dumps(shown, indent=2, ensure_ascii=False)
        parts.append(f"`xformer {run['command']}`{data}, with these settings:\n\n```json\n{content}\n```")
    if not datasets and not facts.runs:
        parts.append("What it was trained on, and how, is not known here.")
    return "\n\n".join(parts)


def scores_of(metrics: Metrics) -> str:
    """One benchmark: the overall scores, what belongs to them, and the other groups, folded."""
    groups = metrics["scores"]
    columns = list(dict.fromkeys(metric for group in groups.values() for metric in group if metric != "ci95"))
    rows = [[name, *(number(metric, group.get(metric)) for metric in columns)] for name, group in groups.items()]
    overall, others = [row for row in rows if row[0] == "all"], [row for row in rows if row[0] != "all"]

    facts = ["Shares are times 100"]
    if {"answered", "records"} <= metrics.keys():
        facts.append(f"{metrics['answered']:,} of {metrics['records']:,} records answered")
    settings = metrics.get("settings", {})
    if prompt := settings.get("prompt", metrics.get("prompt")):
        facts.append(f"prompt `{json.dumps(prompt, ensure_ascii=False)}`")
    if "max_new_tokens" in settings:
        facts.append(decoding(settings))
    if normalisation := metrics.get("normalisation"):
        facts.append(f"normalisation: {normalisation.rstrip('.')}")
    facts += [note.rstrip(".") for note in metrics.get("notes", [])]

    title = " ".join(filter(None, benchmark_of(metrics)))
    text = f"### {title}\n\n{table(['', *columns], overall)}\n\n{'; '.join(facts)}."
    if others:
        text += f"\n\n<details><summary>By group</summary>\n\n{table(['', *columns], others)}\n\n</details>"
    return text


def licence(facts: Facts) -> str:
    """The whole's, that of each thing it was made from, and what is not known."""
    settings = facts.settings
    whole = settings.license_name or settings.license
    if settings.license_link:
        whole = f"[{whole}]({settings.license_link})"
    parts = [f"## Licence\n\nThe whole: {whole}. The Python files: Apache-2.0."]
    if facts.bases:
        parts.append(
            table(["made from", "licence"], [[name, known or "not known"] for name, known in facts.bases.items()])
        )
    if not facts.settled:
        parts.append("""\
**The licence is not settled.** The weights contain frozen parts (CLIP tower, second encoder, language model), each under
its own licence, and not all of these are known here. Whoever publishes this model must look them up and choose a licence
for the whole that they allow.""")
    return "\n\n".join(parts)


CITATION = """\
## Citation

```bibtex
@inproceedings{swetha2024xformer,
  title     = {X-Former: Unifying Contrastive and Reconstruction Learning for {MLLMs}},
  author    = {Swetha, Sirnam and Yang, Jinyu and Neiman, Tal and Rizve, Mamshad Nayeem and Tran, Son and Yao, Benjamin
               and Chilimbi, Trishul and Shah, Mubarak},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2024},
  url       = {https://arxiv.org/abs/2407.13851}
}
```"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def summary(facts: Facts, left_out: list[str]) -> str:
    """What was written, what the card does not say, and how to publish it."""
    output = facts.settings.output_dir
    named = ", ".join(" ".join(filter(None, benchmark_of(metrics))) for metrics in facts.scores)
    lines = [
        f"{output}: {facts.kind.model.__name__}, {facts.gigabytes:,.3f} GB of weights",
        f"scores in the card: {named or 'none; --metrics FILE adds them'}",
        *(f"not in the card: {line}" for line in left_out),
    ]
    if not facts.settled:
        lines.append("the licence is not settled, and the card says so: --license, --base-models NAME=LICENCE")
    lines.append(f"to publish: hf upload {facts.settings.repo_id or 'YOU/NAME'} {output}")
    return "\n".join(lines)
