"""The training loop of both stages, on accelerate.

    loop = TrainingLoop(accelerator, model, config, dataset, collator, run_log, samples)
    loop.train(checkpoint)

A batch from the collator is the model's inputs and "ids", the names of its records. The order of the data is the same
whatever the number of processes; dropout, masks and negatives are drawn by each process for itself.
"""

import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import get_scheduler, set_seed

from xformer_mllm import processes
from xformer_mllm.checkpoints import bf16_is_fast
from xformer_mllm.data.streams import Positioned, Stream
from xformer_mllm.files import write_whole
from xformer_mllm.train import fsdp, run_folder, state
from xformer_mllm.train.config import RunConfig
from xformer_mllm.train.health import query_similarity
from xformer_mllm.train.logs import SPEED, RunLog, Samples

ALIKE_WITHIN = 50  # batches; transformers' Trainer sorts within as many
IDS_SHOWN = 6

Batch = dict[str, Any]


class NonFiniteError(ValueError):
    """A loss or a gradient is nan or infinite: the run stops before the weights are touched."""


def uses_bf16(config: RunConfig) -> bool:
    return bf16_is_fast() if config.bf16 == "auto" else config.bf16 == "yes"


def start_accelerator(trackers: list[str] | None = None) -> Accelerator:
    """Join the other processes, if there are any. `trackers` are names of accelerate's, such as "wandb"."""
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # the loop's own autocast is the same with FSDP and without
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
        log_with=trackers or None,
    )


class ShuffledBatches(Sampler[list[int]]):
    """The indices of one process's batches in one epoch.

    An epoch is a permutation that depends on `seed` and `epoch` alone, cut into joint batches of all processes; the
    records that do not fill the last one are dropped, since ITC and ITM would be easy among few pairs. Data smaller
    than a joint batch is one batch per epoch, and processes without records of their own repeat the first ones.

    lengths: called in each epoch for the lengths of the records' texts; batches are then of like lengths.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        lengths: Callable[[], Sequence[int]] | None = None,
    ):
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self.lengths = lengths
        self.epoch, self.first = 0, 0  # the batch to begin with

    def __len__(self) -> int:
        """The number of batches in a whole epoch."""
        return max(self.size // (self.batch_size * self.world), 1)

    def __iter__(self) -> Iterator[list[int]]:
        rng = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=rng).tolist()
        joint = self.batch_size * self.world
        if self.size < joint and self.world > 1:
            order = list(itertools.islice(itertools.cycle(order), joint))
        elif self.lengths is not None:
            order = _alike(order[: len(self) * joint], self.lengths(), joint, rng)
        for number in range(self.first, len(self)):
            start = number * joint + self.rank * self.batch_size
            yield order[start : start + self.batch_size]


def _alike(order: list[int], lengths: Sequence[int], size: int, rng: torch.Generator) -> list[int]:
    """Sort by length within windows of some batches, then shuffle the batches: batches of `size` differ in each epoch."""
    window = ALIKE_WITHIN * size
    parts = [sorted(order[at : at + window], key=lengths.__getitem__) for at in range(0, len(order), window)]
    flat = [index for part in parts for index in part]
    starts = size * torch.randperm(len(flat) // size, generator=rng)
    return [index for start in starts.tolist() for index in flat[start : start + size]]


class TrainingLoop:
    """Train what is not frozen in a model.

    Every scalar of the model's output is averaged between two logs and over the processes. A run that is killed and
    resumed from a checkpoint continues bit for bit as if it had not stopped.

    Args:
        accelerator: of `start_accelerator`.
        model: maps a batch to a `ModelOutput` with "loss"; frozen parts do not require gradients.
        config: steps, batch size, learning rate, and how often to log, sample and save.
        dataset: of known length, or a `Stream`.
        collator: a list of items -> a batch.
        run_log: receives the averages.
        samples: of held-out images, taken during training.
        after_first_epoch: called once, at the end of the first epoch or of a shorter run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        config: RunConfig,
        dataset: Dataset,
        collator: Callable[[list], Batch],
        run_log: RunLog,
        samples: Samples | None = None,
        after_first_epoch: Callable[[], None] = lambda: None,
    ):
        self.accelerator, self.config, self.run_log, self.samples = accelerator, config, run_log, samples
        self.dataset, self.after_first_epoch = dataset, after_first_epoch
        self.bf16 = uses_bf16(config)
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded:
            fsdp.plan(model, accelerator.state.fsdp_plugin, accelerator.device)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if self.sharded:
            fsdp.keep_tied_weights(self.model)
        self.schedule = get_scheduler(
            "cosine_with_min_lr",
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
            scheduler_specific_kwargs={"min_lr": config.min_learning_rate},
        )
        self.step = 0  # optimizer steps taken
        self.data_seconds = 0.0  # spent in waiting for data
        self._averages: dict[str, list[float]] = {}  # name -> [sum, count] since the last log
        self._images = 0  # since the last log
        self._ids: list[str] = []  # of the current batch
        self._stream = dataset if isinstance(dataset, Stream) else None
        self._sampler, self._loader = self._data(collator)
        self._epoch_steps = config.steps  # a stream has no epochs
        if self._sampler is not None:
            self._epoch_steps = math.ceil(len(self._sampler) / config.gradient_accumulation_steps)
        set_seed(config.seed + accelerator.process_index)

    @property
    def whole_model(self) -> Any:
        """The model without what accelerate wraps it in."""
        return self.accelerator.unwrap_model(self.model)

    def train(self, checkpoint: Path | None = None) -> None:
        """Train to the last step, from a checkpoint if one is given.

        Raises NonFiniteError at nan, ValueError or OSError for data that cannot be read and a checkpoint that cannot
        be written, and KeyboardInterrupt, after saving a checkpoint, where Ctrl-C was pressed.
        """
        config = self.config
        self._resume(checkpoint)
        self.model.train()
        self.run_log.begin(self.step)
        if self.samples is not None:
            self.samples.begin(self.step)
        self._logged, self._saved = (self.step, time.perf_counter()), time.monotonic()
        batches = self._steps()
        with _Interruption() as interruption, self.run_log:
            while self.step < config.steps:
                values = self._update(*self._next(batches))
                self.run_log.advance()
                is_last = self.step == config.steps
                if self.samples is not None and (is_last or self.step % config.sample_steps == 0):
                    self.samples.take(self.whole_model, self.step)
                if is_last or self.step == 1 or self.step % config.logging_steps == 0:
                    self._log(values)
                if self.step == min(self._epoch_steps, config.steps):
                    self.after_first_epoch()
                stop = interruption.caught and not is_last
                if is_last or stop or self.step % config.save_steps == 0 or self._is_save_time():
                    self._save()
                if stop:
                    raise KeyboardInterrupt

    # ---- data

    def _data(self, collator: Callable[[list], Batch]) -> tuple[ShuffledBatches | None, DataLoader]:
        config, process = self.config, self.accelerator
        workers = {"num_workers": processes.loaders(config.num_workers), "pin_memory": process.device.type == "cuda"}
        if self._stream is not None:  # it splits itself between processes, and says with each batch where it stands
            collate, rng = Positioned(collator, self._stream), torch.Generator()
            return None, DataLoader(self._stream, config.batch_size, collate_fn=collate, generator=rng, **workers)
        size = len(self.dataset)  # type: ignore[arg-type]
        lengths = self.dataset.text_lengths if config.group_by_length else None  # type: ignore[attr-defined]
        share = (process.process_index, process.num_processes)
        sampler = ShuffledBatches(size, config.batch_size, config.seed, *share, lengths)
        return sampler, DataLoader(self.dataset, batch_sampler=sampler, collate_fn=collator, **workers)

    def _steps(self) -> Iterator[tuple[list[Batch], float | None]]:
        """The batches of each step from the current one on, without end, and the number of epochs after them."""
        accumulated = self.config.gradient_accumulation_steps
        epoch, done = divmod(self.step, self._epoch_steps)
        while True:
            if self._sampler is not None:
                self._sampler.epoch, self._sampler.first = epoch, done * accumulated
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            # A loader draws its workers' seed from the run's random numbers. A run that resumes within an epoch had
            # done so before its checkpoint.
            with torch.random.fork_rng(devices=[], enabled=done > 0):
                batches = iter(self._loader)
            for number in range(done, self._epoch_steps):
                of_step = list(itertools.islice(batches, accumulated))
                seen = number * accumulated + len(of_step)
                yield of_step, None if self._sampler is None else epoch + seen / len(self._sampler)
            epoch, done = epoch + 1, 0

    def _next(self, steps: Iterator[tuple[list[Batch], float | None]]) -> tuple[list[Batch], float | None]:
        """The next step's batches; the time spent in waiting for them is counted."""
        start = time.perf_counter()
        try:
            batches = next(steps)
        except (ValueError, OSError) as error:
            if not str(error).startswith("Caught "):  # a worker's whole traceback
                raise
            raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        self.data_seconds += time.perf_counter() - start
        return batches

    # ---- a step

    def _update(self, batches: list[Batch], epoch: float | None) -> dict[str, float]:
        """Take one optimizer step on the mean of the batches' losses; return what a log says of it."""
        for batch in batches:
            synchronise = nullcontext() if batch is batches[-1] else self.accelerator.no_sync(self.model)
            with synchronise:
                self.accelerator.backward(self._loss(batch) / len(batches))
        max_norm = self.config.max_grad_norm or math.inf
        norm = float(state.whole(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)))
        if not math.isfinite(norm):
            self._stop(f"gradient norm {norm}", {"grad_norm": norm})
        values = {"grad_norm": norm, "learning_rate": self.schedule.get_last_lr()[0]}
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        return values if epoch is None else {**values, "epoch": epoch}

    def _loss(self, batch: Batch) -> torch.Tensor:
        """The model's loss. Raises NonFiniteError if it, or another scalar of the output, is not a finite number."""
        self._ids, position = batch.pop("ids"), batch.pop("position", None)
        self._images += _image_count(batch, self._ids)
        device = self.accelerator.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.model(**send_to_device(batch, device, non_blocking=True))
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
        if self._stream is not None:
            self._stream.note(position)
        return outputs["loss"]

    def _stop(self, what: str, values: dict[str, float]) -> NoReturn:
        """Raise NonFiniteError with the step, the batch and what to do; all of the batch's ids go into a file."""
        step = self.step + 1
        process = f"-{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        report = self.config.output_dir / f"stopped{process}.json"
        found = {"step": step, "values": {name: str(value) for name, value in values.items()}, "ids": self._ids}
        write_whole(report, json.dumps(found, indent=2) + "\n")
        ids = ", ".join(self._ids[:IDS_SHOWN]) + (", ..." if len(self._ids) > IDS_SHOWN else "")
        raise NonFiniteError(
            f"stopped at step {step}: {what}, on the batch of {len(self._ids)} [{ids}] (all in {report}). Look at "
            "these records; if they are sound, lower --learning-rate, raise --warmup-steps, or set --bf16 no"
        )

    # ---- what is logged

    def _log(self, values: dict[str, float]) -> None:
        """Log `values`, and the averages of every scalar of the model's output since the last log."""
        averages = {name: total / count for name, (total, count) in self._averages.items()}
        if self.accelerator.num_processes > 1:  # every process has had as many batches
            means = torch.tensor([list(averages.values())], dtype=torch.float64, device=self.accelerator.device)
            averages = dict(zip(averages, self.accelerator.gather(means).mean(0).tolist(), strict=True))
        self._averages = {}
        temperature = getattr(self.whole_model, "temperature", None)
        scale = {} if temperature is None else {"temperature": float(state.whole(temperature.detach()))}
        self.run_log.write(self.step, averages | scale | values | self._speed())

    def _speed(self) -> dict[str, float]:
        """Images per second of all processes since the last log, and how long the rest will take at that pace."""
        now, (step, then) = time.perf_counter(), self._logged
        self._logged = (self.step, now)
        images_per_second = self._images * self.accelerator.num_processes / (now - then)
        self._images = 0
        left = (self.config.steps - self.step) * (now - then) / (self.step - step)
        return dict(zip(SPEED, (images_per_second, left), strict=True))

    # ---- checkpoints

    def _is_save_time(self) -> bool:
        """Whether --save-minutes have passed, by the first process's clock, since all processes must save together."""
        if self.step % self.config.logging_steps:
            return False
        return processes.on_first(lambda: time.monotonic() - self._saved >= 60 * self.config.save_minutes)

    def _save(self) -> None:
        """Write a checkpoint. Raises OSError, in one line, if it cannot be written."""
        stream = None if self._stream is None else self._stream.state_dict()
        files = {
            **state.trained(self.whole_model),
            **state.of_optimizer(self.optimizer, self.schedule),
            **state.of_processes({"averages": self._averages, "stream": stream}),
        }
        if self.accelerator.is_main_process:
            folder = self.config.output_dir
            with run_folder.written_whole(folder / f"checkpoint-{self.step}") as partial:
                run_folder.write_files(partial, files)
            run_folder.rotate(folder, self.config.save_total_limit)
        self.accelerator.wait_for_everyone()
        self._saved = time.monotonic()

    def _resume(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        self.step = run_folder.step_of(checkpoint)
        state.load_trained(self.whole_model, checkpoint)
        state.load_optimizer(self.optimizer, self.schedule, checkpoint)
        own = state.load_process(checkpoint, self.accelerator.process_index)
        self._averages = own["averages"]
        if self._stream is not None:
            self._stream.load_state_dict(own["stream"])

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """All weights, put together, on the first process where FSDP has split them; None where they are whole."""
        return state.gathered(self.model.state_dict()) if self.sharded else None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained, for an optimizer: no weight decay for biases and other one-dimensional parameters, as BLIP-2."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith("bias")]
    others = [p for name, p in trained if p.ndim <= 1 or name.endswith("bias")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _image_count(batch: Batch, ids: list[str]) -> int:
    """The number of images of a batch: in stage 2 an image may have several texts, and so several ids."""
    index = batch.get("image_index")
    return len(ids) if index is None else int(index[-1]) + 1


class _Interruption:
    """Ctrl-C during training: `caught` is set, for the loop to save and stop. A second Ctrl-C stops at once.

    With several processes, which may be at different steps, and outside the main thread Ctrl-C stops at once.
    """

    def __init__(self):
        self.caught = False

    def __enter__(self):
        alone = not torch.distributed.is_initialized() and threading.current_thread() is threading.main_thread()
        self.before = signal.signal(signal.SIGINT, self._catch) if alone else None
        return self

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _catch(self, *_):
        self.caught = True
        signal.signal(signal.SIGINT, self.before)
