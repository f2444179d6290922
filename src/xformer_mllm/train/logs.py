"""What a run shows and writes during training: progress lines, log.jsonl, TensorBoard, other trackers and samples.

Only the first process writes.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from xformer_mllm import processes
from xformer_mllm.train.health import CollapseAlarm
from xformer_mllm.train.run_folder import LOG, SAMPLES, append, keep_until

SPEED = ("images_per_second", "seconds_left")  # shown, but not in log.jsonl: no two runs have the same
SHOWN = ("temperature", "grad_norm", "query_similarity")  # in the progress lines, beside losses and accuracies

Track = Callable[[dict[str, float], int], None]


class RunLog:
    """The log of a run of `steps` steps: a progress bar, lines on the terminal, log.jsonl and trackers.

    `track` sends a log and its step to further trackers.
    """

    def __init__(self, folder: Path, steps: int, tensorboard: SummaryWriter | None = None, track: Track | None = None):
        self.path, self.steps, self.tensorboard, self.track = folder / LOG, steps, tensorboard, track
        self.alarm, self.first = CollapseAlarm(), processes.is_first()

    def begin(self, step: int) -> None:
        """Begin after `step` steps: drop the lines that a killed run wrote after its last checkpoint."""
        if self.first:
            keep_until(self.path, step)
        self.bar = tqdm(total=self.steps, initial=step, disable=None if self.first else True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def advance(self) -> None:
        self.bar.update(1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log `values`: the loss and its components, learning rate, speed."""
        if not self.first:
            return
        append(self.path, [{"step": step, **{name: value for name, value in values.items() if name not in SPEED}}])
        self._show(step, values)
        self.alarm.check(step, values)
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"train/{name}", value, step)
            self.tensorboard.flush()
        if self.track is not None:
            self.track(values, step)

    def _show(self, step: int, values: dict[str, float]) -> None:
        parts = [f"step {step:>6}/{self.steps}"]
        parts += [
            f"{name.removesuffix('_loss')} {value:.3f}" for name, value in values.items() if name.endswith("loss")
        ]
        parts += [f"{name} {value:.3f}" for name, value in values.items() if name.endswith("accuracy")]
        parts += [f"{name.replace('_', ' ')} {values[name]:.3f}" for name in SHOWN if name in values]
        rate, left = (values[name] for name in SPEED)
        parts += [
            f"lr {values['learning_rate']:.1e}",
            f"{rate:.3g} images/s",
            f"{timedelta(seconds=round(left))} left",
        ]
        tqdm.write("  ".join(parts))
        sys.stdout.flush()  # a scheduler's log file shows it at once


class Samples:
    """Sample the model on fixed held-out images: texts to samples.jsonl, reconstructions to samples/.

    `write` takes the model and returns one record per image: {"id", "text", "reference", ...}. `draw` takes it and
    returns a sheet of reconstructions. The run's random state is left as it was, so `--sample-steps` changes no loss.
    Under FSDP all processes sample together.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: SummaryWriter | None,
        write: Callable[[nn.Module], list[dict]],
        draw: Callable[[nn.Module], Image.Image] | None = None,
    ):
        self.folder, self.tensorboard, self.write, self.draw = folder, tensorboard, write, draw

    def begin(self, step: int) -> None:
        """Begin after `step` steps: drop what a killed run sampled after its last checkpoint."""
        if processes.is_first():
            keep_until(self.folder / SAMPLES, step)

    def take(self, model: nn.Module, step: int) -> None:
        """Sample `model` as it is after `step` steps."""
        split = model if isinstance(model, FSDPModule) else None
        if not processes.is_first() and split is None:
            return
        was_training = model.training
        with torch.random.fork_rng(), torch.no_grad():
            if split is not None:
                split.unshard()
            records = self.write(model.eval())
            sheet = None if self.draw is None else self.draw(model)
            if split is not None:
                split.reshard()
        model.train(was_training)
        if processes.is_first():
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
