"""A run's checkpoints on disk: written whole or not at all, and looked through before one is used.

A checkpoint is a folder `checkpoint-STEP` of safetensors and JSON files and of one more, `whole.json`, with the size and
the SHA-256 of each of them. It is written under another name and renamed when all of it has reached the disk.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

WHOLE = "whole.json"
NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, the newest first, whether good or not; none if there is no such folder."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


@contextmanager
def written_whole(checkpoint: Path) -> Iterator[Path]:
    """The folder to write a checkpoint's files into; at the end it becomes `checkpoint`.

    Raises OSError, in one line, if a file cannot be written (a full disk); then nothing is left of it.
    """
    partial = checkpoint.with_name(f"partial-{checkpoint.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        _seal(partial)
        if checkpoint.exists():
            shutil.rmtree(checkpoint)
        partial.rename(checkpoint)
        _to_disk(checkpoint.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = next(iter(checkpoints(checkpoint.parent)), None)
        raise OSError(
            f"{checkpoint} could not be written ({error}); "
            f"{f'{kept.name} is kept' if kept else 'there is no earlier one'}: make room on that disk and give the "
            "same command again"
        ) from error


def write_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write {"name.safetensors": {name: tensor}, "name.json": any dict}."""
    for name, content in files.items():
        if name.endswith(".safetensors"):
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, folder / name)
        else:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint ("optimizer.json is cut short"), None if it is as it was written."""
    try:
        listed = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        for name, expected in listed.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} is damaged (its SHA-256 is another)"
    except FileNotFoundError:
        return f"{WHOLE} is missing"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{WHOLE} is damaged"
    return None


def newest_good(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line about each newer one that is not, which is renamed.

    Raises ValueError, in one line, if there are checkpoints and none is whole.
    """
    lines: list[str] = []
    for checkpoint in checkpoints(run):
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint, lines
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        lines.append(f"{checkpoint} is not used: {wrong} (it is now {aside.name})")
    if lines:
        raise ValueError(f"{'; '.join(lines)}; no good checkpoint is left: --no-resume to start over")
    return None, lines


def rotate(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for checkpoint in checkpoints(run)[keep:]:
        shutil.rmtree(checkpoint)


def _seal(folder: Path) -> None:
    """Write `whole.json` about all the other files, and send everything to the disk."""
    listed = {}
    for path in sorted(folder.iterdir()):
        _to_disk(path)  # here at the latest a full or a network disk says so
        listed[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (folder / WHOLE).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    _to_disk(folder / WHOLE)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
