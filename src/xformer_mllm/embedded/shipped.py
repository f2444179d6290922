"""Make the trained models that ship with the package from a finished demo: `python -m xformer_mllm.embedded.shipped`.

Each model is a folder that `from_pretrained` loads: weights rounded to bf16 (they load as fp32), configuration,
processor, and recipe.json with the command that trained it and the SHA-256 of the weights.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file

from xformer_mllm.files import atomic_path, read_json, write_whole

MODELS = Path(__file__).parent / "models"
SOURCES = {"xformer": "xformer/stage2", "qformer": "qformer/stage2", "xformer-stage1": "xformer/stage1"}
"""Name of a shipped model -> its run in the folder of `xformer demo`."""


@dataclass(frozen=True, kw_only=True)
class ShipConfig:
    """Round the demo's models to bf16 and write them into the package."""

    demo: Path = Path("runs/demo")
    """Folder of a finished `xformer demo`."""
    output_dir: Path = MODELS
    """Where the models go, one folder each."""


def ship(config: ShipConfig) -> None:
    """Write the models named in `SOURCES`. Raises FileNotFoundError if a run is not finished."""
    for name, run in SOURCES.items():
        source, target = config.demo / run, config.output_dir / name
        if not (source / "model").is_dir():
            raise FileNotFoundError(
                f"{source}: this run is not finished; run: xformer demo --output-dir {config.demo}"
            )
        with atomic_path(target) as folder:
            shutil.copytree(source / "model", folder)
            weights = load_file(folder / "model.safetensors")
            rounded = {key: t.to(torch.bfloat16) if t.is_floating_point() else t for key, t in weights.items()}
            save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
            _forget_folders(folder / "config.json")
            write_whole(folder / "recipe.json", json.dumps(_recipe(source, folder, config.demo), indent=2) + "\n")
        print(f"{target}: {sum(file.stat().st_size for file in target.rglob('*')) / 1e6:.1f} MB")


def _forget_folders(path: Path) -> None:
    """Remove the names of folders on this machine, which transformers notes in a configuration."""
    config = read_json(path)
    for part in (config, *config.values()):
        if isinstance(part, dict):
            part.pop("_name_or_path", None)
    write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _recipe(run: Path, folder: Path, demo: Path) -> dict:
    settings = read_json(run / "config.json")
    names = ("command", "variant", "data", "text", "steps", "batch_size", "seed", "train_size")
    summary = read_json(run / "summary.json")
    recipe = {
        "made_by": "xformer demo, then python -m xformer_mllm.embedded.shipped",
        "trained_by": {name: settings[name] for name in names if settings.get(name) is not None},
        "torch": summary["torch"],
        "transformers": summary["transformers"],
        "bf16_training": summary["bf16"],
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }
    answers = demo / run.parent.name / "questions" / "metrics.json"
    if run.name == "stage2" and answers.is_file():
        scores = read_json(answers)["scores"]["all"]
        recipe["accuracy"] = {
            "of": "fp32 weights on the demo's test questions",
            "all": scores["accuracy"],
            "n": scores["n"],
        }
    return recipe


if __name__ == "__main__":
    ship(tyro.cli(ShipConfig))
