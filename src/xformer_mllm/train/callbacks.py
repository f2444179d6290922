"""What a run shows and writes while it trains: progress lines, log.jsonl, texts for held-out pictures, TensorBoard."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import TrainerCallback

LOG, SAMPLES = "log.jsonl", "samples.jsonl"


def keep_until(path: Path, step: int) -> None:
    """Drop what a killed run wrote to a JSONL file after `step`, its last checkpoint, and a line cut in two."""
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
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
        self.last = (state.global_step, time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        step, now = state.global_step, time.perf_counter()
        rate = (step - self.last[0]) / (now - self.last[1])
        self.last = (step, now)
        parts = [f"step {step:>6}/{state.max_steps}"]
        parts += [f"{name.removesuffix('_loss')} {value:.3f}" for name, value in logs.items() if name.endswith("loss")]
        parts += [f"{name} {value:.3f}" for name, value in logs.items() if name.endswith("accuracy")]
        parts += [f"lr {logs['learning_rate']:.1e}", f"{rate:.2f} steps/s"]
        tqdm.write("  ".join(parts))

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class RunLog(TrainerCallback):
    """Every log as one line of log.jsonl and in TensorBoard. A resumed run goes on where its checkpoint was."""

    def __init__(self, folder: Path, tensorboard: SummaryWriter):
        self.path, self.tensorboard = folder / LOG, tensorboard

    def on_train_begin(self, args, state, control, **kwargs):
        keep_until(self.path, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps  # the last steps too, however few

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        _append(self.path, [{"step": state.global_step, **logs}])
        for name, value in logs.items():
            self.tensorboard.add_scalar(f"train/{name}", value, state.global_step)
        self.tensorboard.flush()


class HeldOutTexts(TrainerCallback):
    """What the model says about fixed held-out pictures, into samples.jsonl and TensorBoard.

    `write` takes the model and returns one record per picture: {"id", "text", "reference", ...}. It draws nothing from
    the run's random numbers: sampling more or less often changes no loss.
    """

    def __init__(self, folder: Path, tensorboard: SummaryWriter, every: int, write: Callable[[nn.Module], list[dict]]):
        self.path, self.tensorboard, self.every, self.write = folder / SAMPLES, tensorboard, every, write

    def on_train_begin(self, args, state, control, **kwargs):
        keep_until(self.path, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        if (step % self.every and step < state.max_steps) or not state.is_world_process_zero:
            return
        was_training = model.training
        with torch.random.fork_rng(), torch.no_grad():
            records = self.write(model.eval())
        model.train(was_training)
        _append(self.path, [{"step": step, **record} for record in records])
        lines = [f"{r['id']} {r.get('question', '')} | {r['text']} | reference: {r['reference']}" for r in records]
        self.tensorboard.add_text("held-out pictures", "\n\n".join(lines), step)
