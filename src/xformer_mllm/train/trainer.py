"""transformers' Trainer, and the little that a run of ours needs beyond it."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from xformer_mllm.checkpoints import bf16_is_fast
from xformer_mllm.data.streams import Positioned, Stream
from xformer_mllm.files import write_whole
from xformer_mllm.train import fsdp as sharding
from xformer_mllm.train import run_folder, state
from xformer_mllm.train.config import RunConfig
from xformer_mllm.train.health import query_similarity

IDS_SHOWN = 6
SPEED = ("images_per_second", "seconds_left")  # logged, but not into log.jsonl: no two runs have the same


class NonFiniteError(ValueError):
    """A loss or a gradient is nan or infinite: the run stops before the weights are touched."""


def uses_bf16(config: RunConfig) -> bool:
    return bf16_is_fast() if config.bf16 == "auto" else config.bf16 == "yes"


def _image_count(inputs: dict[str, Any], ids: list[str]) -> int:
    """The number of images of a batch: in stage 2 an image may have several texts, and so several ids."""
    index = inputs.get("image_index")
    return len(ids) if index is None else int(index[-1]) + 1


def _arguments(config: RunConfig, train_dataset: Dataset) -> TrainingArguments:
    args = TrainingArguments(
        output_dir=str(config.output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": config.min_learning_rate},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.max_grad_norm,
        bf16=uses_bf16(config),
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        data_seed=config.seed,
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        save_steps=config.save_steps,
        report_to=[name for name in config.report_to if name != "tensorboard"],  # callbacks.py has its own
        run_name=config.output_dir.name,
        ddp_find_unused_parameters=False,
    )
    if isinstance(train_dataset, IterableDataset):
        args.ignore_data_skip = True  # a stream knows itself where it was
    else:
        # A last batch of few pairs would make ITC and ITM easy; only a data set smaller than a batch is one batch.
        args.dataloader_drop_last = len(train_dataset) >= config.batch_size * args.world_size  # type: ignore[arg-type]
    # One process takes one device. DataParallel would split a batch within the process, and ITC's negatives with it.
    args._n_gpu = min(args.n_gpu, 1)
    return args


class XFormerTrainer(Trainer):
    """Trainer that logs every component of the loss, stops at nan, and writes checkpoints without pickle.

    A batch from the collator is the model's inputs and "ids", the names of its records. Every scalar of the model's
    output is averaged between two logs and over the processes. A checkpoint holds what was trained and the state of the
    run; it is written under another name and renamed when complete, so a killed run never resumes from half a
    checkpoint, and a resumed run goes on bit for bit as if it had not stopped. The order of the data is the same
    whatever the number of processes; dropout, masks and negatives are drawn by each process for itself.
    """

    def __init__(self, model: nn.Module, config: RunConfig, train_dataset: Dataset, collator: Any, callbacks: list):
        args = _arguments(config, train_dataset)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collator)
        if self.is_fsdp_enabled:
            sharding.plan(self.model, self.accelerator.state.fsdp_plugin, self.args.device)
        self.model_accepts_loss_kwargs = False  # our losses are means over the batch
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        for callback in callbacks:
            self.add_callback(callback)
        self.folder = config.output_dir
        self.checkpoints_kept = config.save_total_limit
        self.data_seconds = 0.0
        self._averages: dict[str, list[float]] = {}  # name -> [sum, count] since the last log
        self._images = 0  # since the last log
        self._ids: list[str] = []
        self._logged = (0, time.perf_counter())  # step and time of the last log
        if self.args.process_index:
            set_seed(config.seed + self.args.process_index)

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's. A stream splits itself between processes and workers, and says with each batch where it stands."""
        if not isinstance(self.train_dataset, Stream):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=Positioned(self.data_collator, self.train_dataset),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # so that its workers' seeds are not drawn from the run's random numbers
        )

    def get_batch_samples(self, *args, **kwargs):
        """As Trainer's; the time spent in waiting for data is counted.

        Raises ValueError or OSError in one line where a worker process did.
        """
        start = time.perf_counter()
        try:
            batches = super().get_batch_samples(*args, **kwargs)
        except (ValueError, OSError) as error:
            if not str(error).startswith("Caught "):  # a worker's whole traceback
                raise
            raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        self.data_seconds += time.perf_counter() - start
        return batches

    # ---- a step

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Under FSDP, where accelerate leaves it out: the same autocast as without."""
        if self.is_fsdp_enabled and self.args.bf16:
            return torch.autocast(self.args.device.type, dtype=torch.bfloat16)
        return super().autocast_smart_context_manager(cache_enabled)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss. Raises NonFiniteError if it, or a component of it, is not a finite number."""
        self._ids, position = inputs.pop("ids"), inputs.pop("position", None)
        self._images += _image_count(inputs, self._ids)
        outputs = model(**inputs)
        scalars = {name: value for name, value in outputs.items() if torch.is_tensor(value) and value.ndim == 0}
        stages = outputs.get("xformer_output")
        if stages is not None and stages["fused_queries"].shape[1] > 1:
            scalars["query_similarity"] = query_similarity(stages["fused_queries"])
        values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()  # one synchronisation
        now = dict(zip(scalars, values, strict=True))
        if not all(map(math.isfinite, values)):
            self._stop(", ".join(f"{name} {value:.4g}" for name, value in now.items()), now)
        for name, value in now.items():
            total, count = self._averages.get(name, [0.0, 0])
            self._averages[name] = [total + value, count + 1]
        if position is not None:
            self.train_dataset.note(position)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _get_grad_norm(self, model, grad_norm=None):
        norm = float(state.whole(super()._get_grad_norm(model, grad_norm=grad_norm)))
        if not math.isfinite(norm):
            self._stop(f"gradient norm {norm}", {"grad_norm": norm})
        return norm

    def _stop(self, what: str, values: dict[str, float]) -> NoReturn:
        """Raise NonFiniteError with the step, the batch and what to do; all of the batch's ids go into a file."""
        step = self.state.global_step + 1
        process = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
        report = self.folder / f"stopped{process}.json"
        found = {"step": step, "values": {name: str(value) for name, value in values.items()}, "ids": self._ids}
        write_whole(report, json.dumps(found, indent=2) + "\n")
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

    # ---- what is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the averages of every scalar of the model's output since the last log, temperature, speed."""
        if "loss" in logs:
            logs = logs | self._averages_of_all() | self._temperature() | self._speed()
            self._averages = {}
        if isinstance(self.train_dataset, Stream):
            self.state.epoch = None  # Trainer's counts from the last resumption, and nobody knows an epoch's length
        super().log(logs, start_time)

    def _averages_of_all(self) -> dict[str, float]:
        """The mean over the batches since the last log and, as every process has as many, over the processes."""
        if not self._averages:
            return {}
        means = [total / count for total, count in self._averages.values()]
        if self.args.world_size > 1:
            every = torch.tensor([means], dtype=torch.float64, device=self.args.device)
            means = self.accelerator.gather(every).mean(0).tolist()
        return dict(zip(self._averages, means, strict=True))

    def _temperature(self) -> dict[str, float]:
        temperature = getattr(self.accelerator.unwrap_model(self.model), "temperature", None)
        return {} if temperature is None else {"temperature": float(state.whole(temperature.detach()))}

    def _speed(self) -> dict[str, float]:
        """Images per second of all processes since the last log, and how long the rest will take at that pace."""
        now, (step, then) = time.perf_counter(), self._logged
        self._logged = (self.state.global_step, now)
        steps_per_second = (self.state.global_step - step) / (now - then)
        images_per_second = self._images * self.args.world_size / (now - then)
        self._images = 0
        left = (self.state.max_steps - self.state.global_step) / steps_per_second
        return dict(zip(SPEED, (images_per_second, left), strict=True))

    # ---- checkpoints

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            sharding.keep_tied_weights(self.model)
        self._logged = (self.state.global_step, time.perf_counter())
        return prepared

    def _run_epoch(self, model, epoch, train_dataloader, **kwargs) -> None:
        """As Trainer's, which would take one step more where a checkpoint of the last step is resumed."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if hasattr(self.train_dataset, "set_epoch"):  # accelerate tells it on one process only
            self.train_dataset.set_epoch(epoch)
        super()._run_epoch(model=model, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        """Raises OSError, in one line, if it cannot be written."""
        files = {
            **state.trained(self.accelerator.unwrap_model(self.model)),
            **state.of_optimizer(self.optimizer, self.lr_scheduler),
            **state.of_processes({"averages": self._averages, "stream": self._stream_state()}),
        }
        if self.args.should_save:
            checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
            with run_folder.written_whole(checkpoint) as partial:
                run_folder.write_files(partial, files)
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
            run_folder.rotate(self.folder, self.checkpoints_kept)
        self.accelerator.wait_for_everyone()

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """All weights, put together, on the first process where FSDP has split them; None where they are whole."""
        return state.gathered(self.model.state_dict()) if self.is_fsdp_enabled else None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        state.load_trained(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is not None:
            state.load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is None:
            return
        own = state.load_process(Path(checkpoint), self.args.process_index)
        self._averages = own["averages"]
        if own["stream"] is not None:
            self.train_dataset.load_state_dict(own["stream"])

    def _stream_state(self) -> dict[str, Any] | None:
        return self.train_dataset.state_dict() if isinstance(self.train_dataset, Stream) else None
