"""The new folder's settings and code, and the check that it loads.

Settings: configuration, processor, generation settings. Code: the modules of `model/` that the Auto classes need;
transformers runs them with trust_remote_code=True.
"""

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging

from xformer_mllm.export.facts import Facts, Kind, part_of
from xformer_mllm.files import read_json, write_whole
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import FROZEN, LORA
from xformer_mllm.model.processing_xformer import XFormerProcessor

MODEL_CODE = Path(__file__).parents[1] / "model"


def dtype_of(name: str, tensor: torch.Tensor, frozen: str | None) -> torch.dtype:
    """Return a tensor's dtype in the new folder; `frozen`, if given, applies to the frozen parts."""
    is_frozen = part_of(name) in FROZEN and LORA not in name
    changes = frozen is not None and is_frozen and tensor.is_floating_point()
    return getattr(torch, str(frozen)) if changes else tensor.dtype


def check_whole(folder: Path, kind: Kind, source: Path) -> None:
    """Load the new folder on the meta device. Raises ValueError if weights are missing or of another shape."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no loading report
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
    """Return the model's configuration, naming its code and without paths of this machine."""
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
    """Write config.json, the processor's files and generation_config.json."""
    dtypes = {part_of(name): tensor.dtype for name, tensor in facts.wanted.items() if tensor.is_floating_point()}
    frozen = dtypes.get("language_model", dtypes["clip_encoder"])
    config = facts.config
    for part in filter(None, (config, config.clip_config, config.mae_config, config.text_config)):
        part.dtype = str(frozen).removeprefix("torch.")  # transformers loads all but the trainable parts in it
    config.save_pretrained(folder)

    processor.auto_map = {"AutoProcessor": "processing_xformer.XFormerProcessor"}
    processor.save_pretrained(folder)
    for file in folder.rglob("tokenizer_config.json"):
        kept = read_json(file)
        for name in ("is_local", "local_files_only"):  # specific to this machine
            kept.pop(name, None)
        write_whole(file, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def write_code(folder: Path) -> None:
    """Write the modules that transformers loads, and the siblings they import."""
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
    """Repeat each module of `from . import a, b` in the form `from .a import name`.

    transformers finds the files to copy by such lines (dynamic_module_utils.py `get_relative_imports`).
    """

    def add(line: re.Match) -> str:
        return line[0] + "".join(f"\nfrom .{name.strip()} import __name__ as _" for name in line[1].split(","))

    return re.sub(r"^from \. import ([\w, ]+)$", add, code, flags=re.MULTILINE)
