"""The freeze table: which parts of a model are trained, with parameter counts.

The model's `freeze()` decides what is frozen; this module reads, prints and saves it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xformer_mllm.files import write_whole


@dataclass
class FreezeRow:
    """A named part of the model; `sha256` is the hash of its frozen weights, None if it has none."""

    name: str
    parameters: int = 0
    trainable: int = 0
    sha256: str | None = None


def freeze_table(model: nn.Module) -> list[FreezeRow]:
    """List the parts of `model` in its order: the children of its base (`xformer`) and its other children.

    Checkpoints hold trained weights only; the hashes identify the frozen ones.
    """
    parts: dict[str, FreezeRow] = {}
    hashes: dict[str, hashlib._Hash] = {}
    for name, parameter in model.named_parameters():
        group = name.removeprefix("xformer.").split(".")[0]
        part = parts.setdefault(group, FreezeRow(group))
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


def show(table: list[FreezeRow]) -> str:
    """Format the table as text, one line per part and a total."""
    total = FreezeRow("total", sum(part.parameters for part in table), sum(part.trainable for part in table))
    width = max(len(part.name) for part in [*table, total])
    lines = [f"{'part':<{width}} {'parameters':>15} {'trainable':>15}"]
    for part in [*table, total]:
        frozen = "" if part.trainable else "  frozen"
        lines.append(f"{part.name:<{width}} {part.parameters:>15,} {part.trainable:>15,}{frozen}")
    return "\n".join(lines)


def write(table: list[FreezeRow], path: Path) -> None:
    """Write the table as JSON."""
    write_whole(path, json.dumps([asdict(part) for part in table], indent=2) + "\n")


def check_same_frozen(table: list[FreezeRow], path: Path) -> None:
    """Raises ValueError if the frozen weights differ from those in the table at `path`, written when the run began."""
    before = {part["name"]: part["sha256"] for part in json.loads(path.read_text(encoding="utf-8"))}
    for part in table:
        if part.sha256 != before.get(part.name):
            raise ValueError(
                f"{part.name} is not what this run began with: its frozen weights have another hash in {path}; "
                "--no-resume starts over"
            )
