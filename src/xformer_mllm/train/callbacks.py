"""What a run shows and writes during training: progress lines, log.jsonl, TensorBoard and samples.

Only the first process writes files. Whether a step logs or saves a checkpoint is the same on all processes.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import TrainerCallback

from xformer_mllm.train.run_folder import LOG, SAMPLES, append, keep_until
from xformer_mllm.train.trainer import SPEED

SHOWN = ("temperature", "grad_norm", "query_similarity")  # in the progress lines, beside losses and accuracies


class Progress(TrainerCallback):
    """A progress bar on a terminal, and one line per log with every component of the loss."""

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
    """Write every log to log.jsonl and TensorBoard. Drop the lines after the checkpoint a run resumes from."""

    def __init__(self, folder: Path, tensorboard: SummaryWriter | None):
        self.path, self.tensorboard = folder / LOG, tensorboard

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            keep_until(self.path, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps  # also the last steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        kept = {name: value for name, value in logs.items() if name not in SPEED}
        append(self.path, [{"step": state.global_step, **kept}])
        if self.tensorboard is not None:
            for name, value in logs.items():
                self.tensorboard.add_scalar(f"train/{name}", value, state.global_step)
            self.tensorboard.flush()


class SaveByTheClock(TrainerCallback):
    """Save a checkpoint `minutes` after the last one; the clock is checked every `logging_steps` steps.

    The clock of the first process decides, since all processes must save together.
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


class Samples(TrainerCallback):
    """Sample the model on fixed held-out images: texts to samples.jsonl, reconstructions to samples/.

    `write` takes the model and returns one record per image: {"id", "text", "reference", ...}. `draw` takes it and
    returns a sheet of reconstructions. The run's random state is left as it was, so `--sample-steps` changes no loss.
    Under FSDP all processes sample together.
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
        append(self.folder / SAMPLES, [{"step": step, **record} for record in records])
        if sheet is not None:
            sheet.save(self.folder / "samples" / f"reconstruction-{step:06}.png")
        if self.tensorboard is None:
            return
        lines = [f"{r['id']} {r.get('question', '')} | {r['text']} | reference: {r['reference']}" for r in records]
        self.tensorboard.add_text("held-out images", "\n\n".join(lines), step)
        if sheet is not None:
            self.tensorboard.add_image("reconstruction", np.asarray(sheet), step, dataformats="HWC")


class Interruption(TrainerCallback):
    """Ctrl-C during training: save a checkpoint after the current step and stop. A second Ctrl-C stops at once.

    Used as a context manager around training; `caught` says whether Ctrl-C was pressed. With several processes, or
    outside the main thread, Ctrl-C stops at once: processes may be at different steps.
    """

    def __init__(self):
        self.caught = False

    def __enter__(self):
        alone = PartialState().num_processes == 1 and threading.current_thread() is threading.main_thread()
        self.before = signal.signal(signal.SIGINT, self._catch) if alone else None
        return self

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _catch(self, *_):
        self.caught = True
        signal.signal(signal.SIGINT, self.before)

    def on_step_end(self, args, state, control, **kwargs):
        if self.caught:
            control.should_save = control.should_training_stop = True


class Truncations(TrainerCallback):
    """Print how many texts of the first epoch were truncated."""

    def __init__(self, collator: Any):
        self.cut, self.reported = collator.cut, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = self.cut.count.value  # of the images that the run standardised on

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not self.reported and (count := self.cut.count.value - self.before):
            tqdm.write(f"{count:,} texts of the first epoch were truncated to --max-text-tokens {self.cut.limit}")
        self.reported = True
