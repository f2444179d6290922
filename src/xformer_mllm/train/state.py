"""The state of a run between two steps, as tensors and JSON.

Everything is safetensors and JSON: no pickle is written or loaded. Tensors
that FSDP has sharded are gathered before they are written, so a checkpoint is the same whatever the number of processes and
can be resumed with another number, or without FSDP.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

TRAINED, OPTIMIZER, SCHEDULE = "trained.safetensors", "optimizer.safetensors", "optimizer.json"
PROCESSES, RANDOM = "processes.json", "processes.safetensors"

Files = dict[str, dict[str, Any]]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP may have sharded; a collective if it has."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather tensors one by one into the first process's main memory; empty on the other processes."""
    first, found = PartialState().is_main_process, {}
    for name, tensor in tensors.items():
        one = whole(tensor.detach())
        if first:
            found[name] = one.cpu()
    return found


def _as_split(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a whole tensor, if `like` is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


# ---- what was trained: the frozen parameters are where they came from


def trained(model: nn.Module) -> Files:
    """The trained parameters alone."""
    return {TRAINED: gathered({name: p for name, p in model.named_parameters() if p.requires_grad})}


def load_trained(model: nn.Module, folder: Path) -> None:
    """Load what `trained` returned. Raises ValueError if it does not match the trainable parameters of `model`."""
    found = load_file(folder / TRAINED)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(
        name for name in found.keys() | parameters.keys() if _shape(found, name) != _shape(parameters, name)
    )
    if wrong:
        raise ValueError(f"{folder}: does not fit this model ({wrong[0]}); start over with --no-resume")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_as_split(found[name], parameter))


def _shape(tensors: dict[str, Any], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


# ---- optimiser and schedule


def of_optimizer(optimizer: Any, scheduler: Any) -> Files:
    """An optimiser's tensors and settings and a schedule's position."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": t for index, of_one in state["state"].items() for name, t in of_one.items()}
    settings = {"param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    return {OPTIMIZER: gathered(tensors), SCHEDULE: settings}


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Load what `of_optimizer` returned."""
    settings = json.loads((folder / SCHEDULE).read_text(encoding="utf-8"))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = _as_split(tensor, like) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})
    scheduler.load_state_dict(settings["scheduler"])


# ---- what each process has of its own


def of_processes(own: dict[str, Any]) -> Files:
    """Random states and `own` (JSON values) of every process; a collective."""
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state(legacy=True)
    plain = {"own": own, "python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    everyone = gather_object([(tensors, plain)])
    return {
        RANDOM: {f"{rank}.{name}": t for rank, (tensors, _) in enumerate(everyone) for name, t in tensors.items()},
        PROCESSES: {str(rank): plain for rank, (_, plain) in enumerate(everyone)},
    }


def load_process(folder: Path, rank: int) -> dict[str, Any]:
    """Restore this process's random states and return its `own`.

    A process that did not exist when the checkpoint was written keeps its random state and gets the first one's `own`.
    """
    everyone = json.loads((folder / PROCESSES).read_text(encoding="utf-8"))
    if str(rank) not in everyone:
        return everyone["0"]["own"]
    plain = everyone[str(rank)]
    version, keys, gauss = plain["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(plain["numpy"]))
    tensors = load_file(folder / RANDOM)
    torch.random.set_rng_state(tensors[f"{rank}.cpu"])
    if f"{rank}.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{rank}.cuda"])
    return plain["own"]
