"""All that the card says, and where it is found: beside the model, in the folders of the runs that made it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformer_mllm.checkpoints import evaluation_folder, model_folder
from xformer_mllm.export.settings import ExportConfig
from xformer_mllm.export.source import Kind, Tensors
from xformer_mllm.files import read_json
from xformer_mllm.language_models import SMOLLM2_ON_HUB
from xformer_mllm.model.configuration_xformer import XFormerConfig

# What --llm may be called, where that is no name on the hub -> what it is, its licence.
KNOWN = {"opt": ("the tiny OPT of xformer-mllm", "apache-2.0"), "smollm2": (SMOLLM2_ON_HUB, "apache-2.0")}

Metrics = Mapping[str, Any]  # what metrics.json of an evaluation holds


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

    Those that are `named` are taken in any case.
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
    """Raises OSError or ValueError, in one line, if that is no metrics.json."""
    metrics = read_json(file)
    if not isinstance(metrics, dict) or "all" not in metrics.get("scores", {}):
        raise ValueError(f"{file}: holds no scores; it should be the metrics.json of an evaluation")
    return metrics


def benchmark_of(metrics: Metrics) -> tuple[str, str]:
    """Its name and its split."""
    config = metrics.get("config", {})
    return metrics.get("benchmark") or config.get("data") or "unnamed", config.get("split") or ""


def is_of_scenes(metrics: Metrics) -> bool:
    """Whether these are scores on the embedded scenes in a benchmark's format, and so none of the benchmark."""
    return bool(metrics.get("exported_scenes"))


def title_of(metrics: Metrics) -> str:
    """'vqav2 val', and what else its reader must not miss."""
    title = " ".join(filter(None, benchmark_of(metrics)))
    return f"{title}: the embedded scenes in its format" if is_of_scenes(metrics) else title
