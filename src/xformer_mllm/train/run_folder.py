"""The folder of a run: what it holds, when it counts as finished, and the only place that deletes from it.

    config.json, freeze.json      written when the run starts
    start.json                    SHA-256 of the weights of the model that it starts from, if there is one
    log.jsonl, samples.jsonl      one line per log and per sample; samples/ has the images
    tensorboard/
    checkpoint-STEP/              during training
    summary.json, model/          when the run is finished

A checkpoint is a folder of safetensors and JSON files; its `whole.json` has the size and SHA-256 of each of them. It is
written under another name and renamed once all of it is on disk.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from xformer_mllm.commands import flag_of
from xformer_mllm.files import atomic_path, read_json, write_whole
from xformer_mllm.train.config import CONFIG_FILE, RunConfig, differences, read_config

LOG, SAMPLES, FREEZE, SUMMARY, MODEL = "log.jsonl", "samples.jsonl", "freeze.json", "summary.json", "model"
START = "start.json"
WHOLE = "whole.json"
NAME = re.compile(r"checkpoint-(\d+)")


def prepare(config: RunConfig, command: str) -> bool:
    """Prepare output_dir for a run of `config`; return whether there is anything to train.

    With --no-resume the run in it is deleted. Raises ValueError if it holds another run, or one that started from other
    weights than its --from-pretraining or --start-from holds now.
    """
    folder = config.output_dir
    if not (folder / CONFIG_FILE).is_file():
        return True
    there = read_config(folder / CONFIG_FILE, type(config), command)
    if not config.resume:
        _clear(folder)
        return True
    if changed := differences(config, there):
        if (
            is_finished(folder)
            and config.steps > there.steps
            and not differences(config, replace(there, steps=config.steps))
        ):
            raise ValueError(f"{folder}: is finished after {there.steps:,} steps; {_how_to_train_on(config, command)}")
        raise ValueError(
            f"{folder}: holds another run ({'; '.join(changed)}); "
            "choose another --output-dir, or --no-resume to delete that run"
        )
    if is_finished(folder) or checkpoints(folder):
        _check_same_start(config)
    if not is_finished(folder):
        return True
    delete_checkpoints(folder)  # left by a run killed between saving the model and deleting them
    print(f"{folder}: this run is finished; nothing to do (--no-resume to train it again)")
    return False


def _how_to_train_on(config: RunConfig, command: str) -> str:
    """Tell which flag takes a finished run's model, and which one it excludes."""
    flag, others = {
        "train stage1": ("start_from", ("encoders", "second_encoder")),
        "train stage2": ("from_pretraining", ("llm",)),
    }[command]
    defaults = {field.name: field.default for field in fields(config)}
    without = "".join(f" and no {flag_of(name)}" for name in others if getattr(config, name) != defaults[name])
    return (
        f"to train its model further, use {flag_of(flag)} {config.output_dir}{without}, and another --output-dir; "
        "--no-resume deletes this run and trains all steps"
    )


def write_start(config: RunConfig) -> None:
    """Note the weights that the run starts from."""
    if hashes := _start_hashes(config):
        write_whole(config.output_dir / START, json.dumps(hashes, indent=2) + "\n")


def _check_same_start(config: RunConfig) -> None:
    """Raise ValueError if the model that the run started from has been replaced, such as by training stage 1 again."""
    path = config.output_dir / START
    now = _start_hashes(config)
    if now and path.is_file() and read_json(path) != now:  # no weights there now: a finished run is still finished
        raise ValueError(
            f"{config.output_dir}: started from other weights than {config.starts_from} holds now; "
            "choose another --output-dir, or --no-resume to delete that run and start from the new ones"
        )


def _start_hashes(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each weight file of the model that the run starts from, by its name."""
    folder = config.starts_from
    if folder is None:
        return {}
    folder = folder / MODEL if (folder / MODEL).is_dir() else folder
    files = [path for part in ("", "clip/", "mae/") for path in folder.glob(f"{part}model*.safetensors")]
    return {str(path.relative_to(folder)): _sha256(path) for path in sorted(files)}


def is_finished(run: Path) -> bool:
    return (run / MODEL).is_dir()


def _clear(folder: Path) -> None:
    """Delete what a run wrote to its folder, and nothing else."""
    for pattern in ("checkpoint-*", "damaged-*", MODEL, f"{MODEL}.partial", "tensorboard", "samples"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    for pattern in (LOG, SAMPLES, FREEZE, START, SUMMARY, CONFIG_FILE, "*.json.partial", "*.jsonl.partial"):
        for path in folder.glob(pattern):
            path.unlink()
    delete_reports(folder)


def delete_reports(folder: Path) -> None:
    """Delete the reports of non-finite losses of an earlier attempt."""
    for path in folder.glob("stopped*.json"):
        path.unlink()


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Append one JSON line per record."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def keep_until(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote to a JSONL file after `step`, its last checkpoint, and a truncated line."""
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:  # the last may end within a character
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line + b"\n")
    with atomic_path(path) as partial:
        partial.write_bytes(b"".join(kept))


def save_model(run: Path, model: Any, processor: Any, weights: dict[str, Any] | None, summary: dict[str, Any]) -> None:
    """Write summary.json and model/, then delete the checkpoints. `weights` replace the model's own if FSDP split them."""
    write_whole(run / SUMMARY, json.dumps(summary, indent=2) + "\n")
    with atomic_path(run / MODEL) as partial:
        model.save_pretrained(partial, state_dict=weights)
        processor.save_pretrained(partial)
    delete_checkpoints(run)
    print(f"finished: {run / MODEL}")


# ---- checkpoints


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(run: Path) -> list[Path]:
    """List a run's checkpoints, newest first, without checking them; empty if there is no such folder."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


@contextmanager
def written_whole(checkpoint: Path) -> Iterator[Path]:
    """A folder to write a checkpoint's files to; it becomes `checkpoint` when the block ends.

    Raises OSError if a file cannot be written (a full disk); then nothing is left of the checkpoint.
    """
    try:
        with atomic_path(checkpoint) as partial:
            partial.mkdir()
            yield partial
            _seal(partial)
        _to_disk(checkpoint.parent)
    except (OSError, SafetensorError) as error:
        kept = next(iter(checkpoints(checkpoint.parent)), None)
        raise OSError(
            f"{checkpoint} could not be written ({error}); "
            f"{f'{kept.name} is kept' if kept else 'there is no earlier one'}: free some disk space and run the "
            "same command again"
        ) from error


def write_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write files given as {"name.safetensors": {name: tensor}, "name.json": any dict}."""
    for name, content in files.items():
        if name.endswith(".safetensors"):
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, folder / name)
        else:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")


def fault(checkpoint: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if all its files are as they were written."""
    try:
        listed = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        for name, expected in listed.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} is damaged (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{WHOLE} is missing"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{WHOLE} is damaged"
    return None


def newest_good(run: Path) -> tuple[Path | None, list[str]]:
    """Find the newest intact checkpoint; rename each damaged newer one and return a line about it.

    Raises ValueError if there are checkpoints but none is intact.
    """
    lines: list[str] = []
    for checkpoint in checkpoints(run):
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint, lines
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        lines.append(f"{checkpoint} is not used: {wrong} (renamed to {aside.name})")
    if lines:
        raise ValueError(f"{'; '.join(lines)}; no intact checkpoint is left; --no-resume starts over")
    return None, lines


def rotate(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for checkpoint in checkpoints(run)[keep:]:
        shutil.rmtree(checkpoint)


def delete_checkpoints(run: Path) -> None:
    """Delete all checkpoints of a run, including partial and damaged ones."""
    for pattern in ("checkpoint-*", "damaged-*"):
        for checkpoint in run.glob(pattern):
            shutil.rmtree(checkpoint)


def _seal(folder: Path) -> None:
    """Write `whole.json` and flush all files to disk."""
    listed = {}
    for path in sorted(folder.iterdir()):
        _to_disk(path)  # a full or a network disk reports its error here
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
