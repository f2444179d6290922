"""What a run shows and writes while it trains: progress lines, log.jsonl, TensorBoard, and held-out images.

The files are those of the first process; what decides about a step (log, checkpoint) is decided alike on all of them.
"""

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import TrainerCallback

from xformer_mllm.train.trainer import SPEED

LOG, SAMPLES = "log.jsonl", "samples.jsonl"
SHOWN = ("temperature", "grad_norm", "query_similarity")  # in the progress lines, beside losses and accuracies


def keep_until(path: Path, step: int) -> None:
    """Drop what a killed run wrote to a JSONL file after `step`, its last checkpoint, and a line cut in two."""
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:  # the last may end within a character
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line + b"\n")
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


class Progress(TrainerCallback):
    """A bar on a terminal, and one line per log with every component of the loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, disable=None if state.is_world_process_zero else True
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        parts = [f"step {state.global_step:>6}/{state.max_steps}"]
        parts += [f"{name.removesuffix('_loss')} {value:.3f}" for name, value in logs.items() if name.endswith("loss")]
        parts += [f"{name} {value:.3f}" for name, value in logs.items() if name.endswith("accuracy")]
        parts += [f"{name.replace('_', ' ')} {logs[name]:.3f}" for name in SHOWN if name in logs]
        rate, left = (logs[name] for name in SPEED)
        parts += [f"lr {logs['learning_rate']:.1e}", f"{rate:.3g} images/s", f"{timedelta(seconds=round(left))} left"]
        tqdm.write("  ".join(parts))
        sys.stdout.flush()  # a scheduler's log file shows it at once

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class RunLog(TrainerCallback):
    """Every log as one line of log.jsonl and in TensorBoard. A resumed run goes on where its checkpoint was."""

    def __init__(self, folder: Path, tensorboard: SummaryWriter | None):
        self.path, self.tensorboard = folder / LOG, tensorboard

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            keep_until(self.path, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps  # the last steps too, however few

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        told = {name: value for name, value in logs.items() if name not in SPEED}
        _append(self.path, [{"step": state.global_step, **told}])
        if self.tensorboard is not None:
            for name, value in logs.items():
                self.tensorboard.add_scalar(f"train/{name}", value, state.global_step)
            self.tensorboard.flush()


class SaveByTheClock(TrainerCallback):
    """A checkpoint also when `minutes` have passed since the last; the clock is looked at every `logging_steps` steps.

    The first process's clock counts, for all must write a checkpoint together.
    """

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.logging_steps == 0:
            due = [time.monotonic() - self.saved >= self.seconds]
            control.should_save |= broadcast_object_list(due)[0]

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()


class HeldOut(TrainerCallback):
    """What the model makes of fixed held-out images: texts into samples.jsonl, reconstructions into samples/.

    `write` takes the model and returns one record per image: {"id", "text", "reference", ...}; `draw` takes it and
    returns a sheet of reconstructions. Both draw nothing from the run's random numbers: sampling more or less often
    changes no loss. A model that FSDP has split must be asked on all processes.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: SummaryWriter | None,
        every: int,
        write: Callable[[nn.Module], list[dict]],
        draw: Callable[[nn.Module], Image.Image] | None = None,
    ):
        self.folder, self.tensorboard, self.every, self.write, self.draw = folder, tensorboard, every, write, draw

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            keep_until(self.folder / SAMPLES, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step, split = state.global_step, isinstance(model, FSDPModule)
        if (step % self.every and step < state.max_steps) or not (state.is_world_process_zero or split):
            return
        was_training = model.training
        with torch.random.fork_rng(), torch.no_grad():
            if split:
                model.unshard()
            records = self.write(model.eval())
            sheet = None if self.draw is None else self.draw(model)
            if split:
                model.reshard()
        model.train(was_training)
        if state.is_world_process_zero:
            self._keep(step, records, sheet)

    def _keep(self, step: int, records: list[dict], sheet: Image.Image | None) -> None:
        _append(self.folder / SAMPLES, [{"step": step, **record} for record in records])
        if sheet is not None:
            sheet.save(self.folder / "samples" / f"reconstruction-{step:06}.png")
        if self.tensorboard is None:
            return
        lines = [f"{r['id']} {r.get('question', '')} | {r['text']} | reference: {r['reference']}" for r in records]
        self.tensorboard.add_text("held-out images", "\n\n".join(lines), step)
        if sheet is not None:
            self.tensorboard.add_image("reconstruction", np.asarray(sheet), step, dataformats="HWC")
