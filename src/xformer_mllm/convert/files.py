"""One checkpoint as it is found, a hub id, a folder or a .pth file -> names, shapes, and tensors one at a time.

No code is unpickled, and what is damaged or is no checkpoint is said in one line (ValueError or OSError).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from xformer_mllm.files import read_json


@dataclass
class Source:
    """A checkpoint.

    label: as the user named it. tensors: shapes and dtypes, on the meta device. read: one tensor by its name. folder,
    config: None for a .pth file. left: names that have no use in the new model, and why ("": nobody knows).
    """

    label: str
    tensors: dict[str, torch.Tensor]
    read: Callable[[str], torch.Tensor]
    folder: Path | None = None
    config: Any = None
    left: dict[str, str] = field(default_factory=dict)

    def let_go(self) -> None:
        """Nothing is read any more: what is held in memory for it may go."""
        self.read = dict[str, torch.Tensor]().__getitem__


def local(name: str, weights: bool = True) -> Path:
    """A file or folder as it is; a hub id downloaded (weights as safetensors where there are any) -> its folder."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name}: no such file or folder")
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"]))
        if weights:
            snapshot_download(name, allow_patterns=["model*.safetensors"])
            if not list(folder.glob("model*.safetensors")):
                snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: no such file or folder, and not to be had from the hub ({first_line(error)}); download it where "
            "there is a network and give its folder"
        ) from None
    return folder


def first_line(error: Exception) -> str:
    """Of what another library says, which may be a page."""
    return str(error).strip().split("\n")[0][:160]


def read_config(folder: Path, label: str) -> PreTrainedConfig:
    """The configuration in a folder of transformers. Raises ValueError if there is none, or of an unknown kind."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{label}: not a checkpoint of transformers (no config.json in it)")
    kind = read_json(folder / "config.json").get("model_type")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError):
        raise ValueError(f"{label}: an architecture that transformers does not know ('{kind}')") from None


def read_tokenizer(folder: Path, label: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises ValueError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{label}: no tokenizer could be read from it ({first_line(error)})") from None


def open_folder(label: str, folder: Path, config: PreTrainedConfig) -> Source:
    """A folder of transformers, in its own names."""
    if files := sorted(folder.glob("model*.safetensors")):
        handles = [_open_safetensors(file) for file in files]
        where = {key: handle for handle in handles for key in handle.keys()}  # noqa: SIM118
        meta = {key: _meta(handle.get_slice(key)) for key, handle in where.items()}
        return Source(label, meta, lambda key: where[key].get_tensor(key), folder, config)
    if files := sorted(folder.glob("pytorch_model*.bin")):
        return _pickled(label, files, folder, config)
    raise ValueError(f"{label}: no weights in it (model.safetensors or pytorch_model.bin)")


def open_pth(label: str, file: Path) -> Source:
    """A file of torch.save, as LAVIS publishes."""
    return _pickled(label, [file])


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or cut short ({error}); download it again") from None


def _meta(part: Any) -> torch.Tensor:
    """What a safetensors file says of a tensor, on the meta device; of its dtype only whether it is a count."""
    floating = part.get_dtype().startswith(("F", "BF"))
    return torch.empty(part.get_shape(), dtype=torch.float32 if floating else torch.int64, device="meta")


def _pickled(label: str, files: Sequence[Path], folder: Path | None = None, config: Any = None) -> Source:
    tensors = {key: tensor for file in files for key, tensor in _unpickled(file).items()}
    return Source(label, {key: t.to("meta") for key, t in tensors.items()}, tensors.__getitem__, folder, config)


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of torch.save, where nothing but tensors and plain containers is unpickled.

    LAVIS puts it under "model". The tensors stay on disk until they are used, where the file's format allows it.
    """
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch before 1.6 wrote another format, which cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling foreign bytes raises anything
        raise ValueError(f"{file}: not a checkpoint that can be read safely ({first_line(error)})") from None
    state = content.get("model", content) if isinstance(content, dict) else None
    tensors = {key: t for key, t in state.items() if isinstance(t, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{file}: not a checkpoint (no tensors in it)")
    return tensors
