"""The freeze table: which part of a model a stage trains, with parameter counts.

What is frozen is set in one place, the model's own `freeze()`; here it is read off, shown and written down.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass
class Part:
    """One row: a named part of the model; `sha256` is that of its frozen weights, None where there are none."""

    name: str
    parameters: int = 0
    trainable: int = 0
    sha256: str | None = None


def freeze_table(model: nn.Module) -> list[Part]:
    """The parts of `model` in its own order: the children of its base (`xformer`) and those beside it.

    The hash of what is frozen goes with a checkpoint, which holds only what was trained.
    """
    parts: dict[str, Part] = {}
    hashes: dict[str, hashlib._Hash] = {}
    for name, parameter in model.named_parameters():
        group = name.removeprefix("xformer.").split(".")[0]
        part = parts.setdefault(group, Part(group))
        part.parameters += parameter.numel()
        if parameter.requires_grad:
            part.trainable += parameter.numel()
        else:
            hashes.setdefault(group, hashlib.sha256()).update(_bytes(parameter))
    for group, digest in hashes.items():
        parts[group].sha256 = digest.hexdigest()
    return list(parts.values())


def _bytes(parameter: torch.Tensor) -> Any:
    return parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def show(table: list[Part]) -> str:
    """The table as text, one line per part and a total."""
    total = Part("total", sum(part.parameters for part in table), sum(part.trainable for part in table))
    width = max(len(part.name) for part in [*table, total])
    lines = [f"{'part':<{width}} {'parameters':>15} {'trainable':>15}"]
    for part in [*table, total]:
        frozen = "" if part.trainable else "  frozen"
        lines.append(f"{part.name:<{width}} {part.parameters:>15,} {part.trainable:>15,}{frozen}")
    return "\n".join(lines)


def write(table: list[Part], path: Path) -> None:
    """Write the table as JSON, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps([asdict(part) for part in table], indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def check_same_frozen(table: list[Part], path: Path) -> None:
    """Raises ValueError if the frozen weights are not those of the table written at `path` when the run began."""
    before = {part["name"]: part["sha256"] for part in json.loads(path.read_text(encoding="utf-8"))}
    for part in table:
        if part.sha256 != before.get(part.name):
            raise ValueError(
                f"{part.name} is not what this run began with ({path} has another hash of its frozen weights); "
                "start over with --no-resume"
            )
