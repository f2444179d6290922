"""The state of a run between two steps, as safetensors and JSON.

transformers' Trainer writes optimiser, schedule and random states as pickles; we neither publish nor load pickles.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

TRAINED = "trained.safetensors"


def save_trained(model: nn.Module, folder: Path) -> None:
    """Save the trained parameters alone: the frozen ones are where they came from."""
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / TRAINED)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Load what `save_trained` saved. Raises ValueError if that is not exactly what `model` trains."""
    trained = load_file(folder / TRAINED)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(
        name for name in trained.keys() | parameters.keys() if _shape(trained, name) != _shape(parameters, name)
    )
    if wrong:
        raise ValueError(f"{folder}: does not fit this model ({wrong[0]}); start over with --no-resume")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])


def _shape(tensors: dict[str, Any], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def save_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Save an optimiser's tensors and settings and a schedule's position."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": t for index, of_one in state["state"].items() for name, t in of_one.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "optimizer.safetensors")
    settings = {"param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / "optimizer.json").write_text(json.dumps(settings), encoding="utf-8")


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Load what `save_optimizer` saved."""
    settings = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})
    scheduler.load_state_dict(settings["scheduler"])


def save_process(folder: Path, rank: int, averages: dict[str, list[float]]) -> None:
    """Save what belongs to one process: its random states, and the averages begun since the last log."""
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"process-{rank}.safetensors")
    kind, keys, *rest = np.random.get_state(legacy=True)
    plain = {"averages": averages, "python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    (folder / f"process-{rank}.json").write_text(json.dumps(plain), encoding="utf-8")


def load_process(folder: Path, rank: int) -> dict[str, list[float]]:
    """Load what `save_process` saved; returns the averages. A process that was not there keeps its own state."""
    path = folder / f"process-{rank}.json"
    if not path.is_file():
        return {}
    plain = json.loads(path.read_text(encoding="utf-8"))
    version, keys, gauss = plain["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(plain["numpy"]))
    tensors = load_file(folder / f"process-{rank}.safetensors")
    torch.random.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    return plain["averages"]
