"""transformers' Trainer, and the little that a run of ours needs beyond it."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from xformer_mllm.checkpoints import bf16_is_fast
from xformer_mllm.train import state
from xformer_mllm.train.config import RunConfig

IDS_SHOWN = 6


class NonFiniteError(ValueError):
    """A loss or a gradient is nan or infinite: the run stops before the weights are touched."""


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint in a run's folder (an incomplete one never has a checkpoint's name)."""
    newest = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    return Path(newest) if newest else None


def _arguments(config: RunConfig, train_dataset: Dataset) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(config.output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.max_grad_norm,
        bf16=bf16_is_fast() if config.bf16 == "auto" else config.bf16 == "yes",
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        data_seed=config.seed,
        # A last batch of few pairs would make ITC and ITM easy; only a data set smaller than a batch is one batch.
        dataloader_drop_last=len(train_dataset) >= config.batch_size,  # type: ignore[arg-type]
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        report_to="none",
    )


class XFormerTrainer(Trainer):
    """Trainer that logs every component of the loss, stops at nan, and writes checkpoints without pickle.

    A batch from the collator is the model's inputs and "ids", the names of its records. Every scalar of the model's
    output is averaged between two logs. A checkpoint holds what was trained and the state of the run; it is written
    under another name and renamed when complete, so a killed run never resumes from half a checkpoint, and a resumed
    run goes on bit for bit as if it had not stopped. In a run of several processes the log is that of the first.
    """

    def __init__(self, model: nn.Module, config: RunConfig, train_dataset: Dataset, collator: Any, callbacks: list):
        args = _arguments(config, train_dataset)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collator)
        self.model_accepts_loss_kwargs = False  # our losses are means over the batch
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        for callback in callbacks:
            self.add_callback(callback)
        self.folder = config.output_dir
        self.data_seconds = 0.0
        self._averages: dict[str, list[float]] = {}  # name -> [sum, count] since the last log
        self._ids: list[str] = []

    # ---- a step

    def get_batch_samples(self, *args, **kwargs):
        """As Trainer's; the time spent in waiting for data is counted."""
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.data_seconds += time.perf_counter() - start
        return batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss. Raises NonFiniteError if it, or a component of it, is not a finite number."""
        self._ids = inputs.pop("ids")
        outputs = model(**inputs)
        scalars = {name: value for name, value in outputs.items() if torch.is_tensor(value) and value.ndim == 0}
        values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()  # one synchronisation
        now = dict(zip(scalars, values, strict=True))
        if not all(map(math.isfinite, values)):
            self._stop(", ".join(f"{name} {value:.4g}" for name, value in now.items()), now)
        for name, value in now.items():
            total, count = self._averages.get(name, [0.0, 0])
            self._averages[name] = [total + value, count + 1]
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _get_grad_norm(self, model, grad_norm=None):
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(norm):
            self._stop(f"gradient norm {norm}", {"grad_norm": norm})
        return norm

    def _stop(self, what: str, values: dict[str, float]) -> NoReturn:
        """Raise NonFiniteError with the step, the batch and what to do; all of the batch's ids go into a file."""
        step = self.state.global_step + 1
        report = self.folder / "stopped.json"
        found = {"step": step, "values": {name: str(value) for name, value in values.items()}, "ids": self._ids}
        report.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        ids = ", ".join(self._ids[:IDS_SHOWN]) + (", ..." if len(self._ids) > IDS_SHOWN else "")
        raise NonFiniteError(
            f"stopped at step {step}: {what}, on the batch of {len(self._ids)} [{ids}] (all in {report}). Look at "
            "these records; if they are sound, lower --learning-rate, raise --warmup-steps, or set --bf16 no"
        )

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices and the like: no weight decay for biases and other one-dimensional parameters, as BLIP-2."""
        return [name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias")]

    def floating_point_ops(self, inputs) -> int:
        """Not counted: counting takes a walk over all modules in every step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the averages of every scalar of the model's output since the last log."""
        if "loss" in logs:
            logs = logs | {name: total / count for name, (total, count) in self._averages.items()}
            self._averages = {}
        super().log(logs, start_time)

    # ---- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        complete = self.folder / f"checkpoint-{self.state.global_step}"
        partial = self.folder / f"partial-{complete.name}"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            state.save_trained(self.accelerator.unwrap_model(self.model), partial)
            state.save_optimizer(self.optimizer, self.lr_scheduler, partial)
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        state.save_process(partial, self.args.process_index, self._averages)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(complete, ignore_errors=True)
            partial.rename(complete)
            rotate_checkpoints(str(self.folder), self.args.save_total_limit)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        state.load_trained(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is not None:
            state.load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is not None:
            self._averages = state.load_process(Path(checkpoint), self.args.process_index)
