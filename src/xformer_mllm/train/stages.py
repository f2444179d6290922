"""The two stages of training, from a configuration to a finished run folder.

A run's folder: config.json (the resolved configuration), freeze.json, log.jsonl, samples.jsonl with samples/ (the
held-out images), tensorboard/, checkpoint-N/ while it runs; and when it is finished summary.json and model/.
"""

import importlib.util
import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from torch.utils.tensorboard import SummaryWriter
from transformers import set_seed

from xformer_mllm import defaults, processes
from xformer_mllm.checkpoints import continue_pretraining, start_generation
from xformer_mllm.data.questions import CAPTION_PROMPT, QUESTION_PROMPT
from xformer_mllm.language_models import check_on_hub, language_model_dir
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import XFormerForConditionalGeneration, XFormerForPreTraining
from xformer_mllm.report.reconstructions import panel_grid, reconstructions, to_panels
from xformer_mllm.train import datasets, freeze, run_checkpoints
from xformer_mllm.train.batches import Stage1Collator, Stage2Collator
from xformer_mllm.train.callbacks import LOG, SAMPLES, HeldOut, Progress, RunLog, SaveByTheClock
from xformer_mllm.train.config import (
    CONFIG_FILE,
    RunConfig,
    Stage1Config,
    Stage2Config,
    differences,
    read_config,
    write_config,
)
from xformer_mllm.train.datasets import Records
from xformer_mllm.train.feature_cache import FeatureCache, WithFeatures
from xformer_mllm.train.health import CollapseAlarm
from xformer_mllm.train.trainer import XFormerTrainer, uses_bf16
from xformer_mllm.variants import variant_config

STANDARDISED_OVER = 256  # images, whose tokens' statistics the fresh layer norms start with
SAMPLE_TOKENS = 20

Write = Callable[[nn.Module, torch.Tensor], list[str]]  # model, pixels of the held-out images -> a text for each
Ask = Callable[[nn.Module], Records]
Draw = Callable[[nn.Module], Image.Image]


def run_stage1(config: Stage1Config) -> Path:
    """Train stage 1 and return the run's folder.

    Raises ValueError for an unknown variant or data set and where output_dir holds another run, FileNotFoundError for
    a missing folder, NonFiniteError at nan.
    """
    process = processes.join()
    if processes.on_first(lambda: _is_finished(config, "train stage1")):
        return config.output_dir
    set_seed(config.seed)
    processor: Any
    model, processor = processes.together(lambda: _start(config))
    train, held_out = processes.together(lambda: datasets.captions(config, _image_size(processor)))
    collator = Stage1Collator(processor, config.max_text_tokens)
    model.to(process.device)
    if config.start_from is None:  # a converted model's norms were trained
        pixels = collator(datasets.records_of(train, STANDARDISED_OVER))["pixel_values"]
        model.xformer.standardise(pixels.to(process.device))
    processes.take_weights_of_first(model)  # of a stream, each process has seen other images
    tokenizer = processor.qformer_tokenizer

    def write(model: nn.Module, pixels: torch.Tensor) -> list[str]:
        ids = model.caption(pixels, tokenizer.sep_token_id, max_new_tokens=SAMPLE_TOKENS)  # type: ignore[operator]
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    return _run(config, "train stage1", model, processor, train, held_out, collator, write)


def _start(config: Stage1Config) -> tuple[Any, Any]:
    if config.start_from is not None:
        return continue_pretraining(config.start_from, config.variant)
    name = config.second_encoder
    if name is None:
        return defaults.start_pretraining(config.variant, config.seed)
    if not Path(name).exists():
        check_on_hub("--second-encoder", name)
    variant_config(config.variant, defaults.config())  # an unknown variant is not the encoder's fault
    try:
        return defaults.start_pretraining(config.variant, config.seed, name)
    except AttributeError as error:  # a language model lacks the settings of a tower
        raise ValueError(f"--second-encoder {name}: is no vision tower ({error})") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"--second-encoder {name}: {error}") from error


def run_stage2(config: Stage2Config) -> Path:
    """Train stage 2 on the model of a stage-1 run and return the run's folder. Raises as `run_stage1`."""
    processes.join()
    if processes.on_first(lambda: _is_finished(config, "train stage2")):
        return config.output_dir
    set_seed(config.seed)
    aware = config.instruction_aware and config.text == "questions"
    model, processor = processes.together(
        lambda: start_generation(
            _with_language_model(config, _pretrained(config)),
            config.llm,
            config.seed,
            aware,
            config.chat_template,
            config.lora_rank,
        )
    )
    open_data = datasets.questions if config.text == "questions" else datasets.captions
    train, held_out = processes.together(lambda: open_data(config, _image_size(processor)))
    end = model.generation_config.eos_token_id
    collator = Stage2Collator(processor, end if isinstance(end, int) else end[0], config.max_text_tokens)
    asked = [QUESTION_PROMPT.format_map(r) if "question" in r else CAPTION_PROMPT for r in held_out]

    def write(model: nn.Module, pixels: torch.Tensor) -> list[str]:
        text = processor(text=asked).to(pixels.device)
        tokens = model.generate(pixels, **text, max_new_tokens=SAMPLE_TOKENS, do_sample=False)  # type: ignore[operator]
        return processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return _run(config, "train stage2", model, processor, train, held_out, collator, write)


def _pretrained(config: Stage2Config) -> Path:
    """The stage-1 model's folder.

    Raises FileNotFoundError if there is none, ValueError if it is of another variant than asked for.
    """
    run = config.from_pretraining
    if not (run / "model").is_dir():
        if any(run.glob("model*.safetensors")):
            return run
        why = "that run is not finished" if run_checkpoints.checkpoints(run) else "no stage-1 model there"
        raise FileNotFoundError(f"{run}: {why}; run: xformer train stage1 --output-dir {run}")
    if config.variant is not None:
        trained = read_config(run / CONFIG_FILE, Stage1Config, "train stage1").variant
        if trained != config.variant:
            raise ValueError(f"{run}: holds the variant {trained}, not {config.variant}")
    return run / "model"


def _with_language_model(config: Stage2Config, folder: Path) -> Path:
    """The folder, once it is known that a language model is to be had: the model's own, if it has one, else --llm.

    Raises ValueError if both are asked for, or if there is none of that name.
    """
    whole = XFormerConfig.from_pretrained(folder)
    if whole.architectures == [XFormerForConditionalGeneration.__name__]:
        if config.llm != Stage2Config.llm:
            raise ValueError(f"{folder}: holds its own language model; leave --llm out")
        if processes.is_first():
            inner = whole.text_config
            print(f"language model: the one in {folder} ({inner.model_type} of width {inner.hidden_size})")
    elif isinstance(found := language_model_dir(config.llm), str):
        check_on_hub("--llm", found)
    return folder


def _image_size(processor: Any) -> int:
    return processor.image_processor.size["height"]


def _is_finished(config: RunConfig, command: str) -> bool:
    """Whether output_dir holds this very run, finished; with --no-resume, nothing is there any more.

    Raises ValueError if another run is there.
    """
    folder = config.output_dir
    if not (folder / CONFIG_FILE).is_file():
        return False
    there = read_config(folder / CONFIG_FILE, type(config), command)
    if not config.resume:
        _clear(folder)
        return False
    if changed := differences(config, there):
        raise ValueError(
            f"{folder}: holds another run ({'; '.join(changed)}); "
            "choose another --output-dir, or --no-resume to delete that run"
        )
    if (folder / "model").is_dir():
        _delete_checkpoints(folder)  # of a run that was killed just before
        print(f"{folder}: this run is finished; nothing to do (--no-resume to train it anew)")
        return True
    return False


def _clear(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else."""
    for pattern in ("checkpoint-*", "damaged-*", "partial-*", "model", "tensorboard", "samples"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    for name in (LOG, SAMPLES, "freeze.json", "summary.json", "stopped*.json", CONFIG_FILE):
        for path in folder.glob(name):
            path.unlink()


def _run(
    config: RunConfig,
    command: str,
    model: Any,
    processor: Any,
    train: Dataset,
    held_out: Records,
    collator: Callable,
    write: Write,
) -> Path:
    """What both stages share: freeze, train or go on, save."""
    folder = config.output_dir
    model.freeze()
    checkpoint = processes.on_first(lambda: _begin(config, command, model, train))
    start = run_checkpoints.step_of(checkpoint) if checkpoint else 0
    if config.feature_cache is not None:
        train, collator = _cached(config, model, train, collator, _image_size(processor))
    pixels = processor(images=[record["image"] for record in held_out])["pixel_values"]
    texts, draw = _texts(folder, pixels, held_out, write), _draw(model, pixels)
    tensorboard = None
    if processes.is_first() and "tensorboard" in config.report_to:
        tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
    callbacks = [
        Progress(),
        RunLog(folder, tensorboard),
        SaveByTheClock(config.save_minutes),
        HeldOut(folder, tensorboard, config.sample_steps, texts, draw),
        CollapseAlarm(),
    ]
    trainer = XFormerTrainer(model, config, train, collator, callbacks)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if tensorboard is not None:
        tensorboard.close()
    _finish(folder, trainer, processor, start, time.perf_counter() - began)
    return folder


def _begin(config: RunConfig, command: str, model: Any, train: Dataset) -> Path | None:
    """Make the run's folder ready, say what will be done, and return the checkpoint to go on from, if any."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--report-to {name}: that package is not installed; pip install {name}")
    if config.feature_cache is not None and isinstance(train, IterableDataset):
        raise ValueError(f"--feature-cache: {config.data} is a stream, whose images nobody has counted; leave it out")
    folder = config.output_dir
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for path in folder.glob("stopped*.json"):
        path.unlink()
    table = freeze.freeze_table(model)
    print(freeze.show(table))
    print(f"{datasets.described(train)} of {config.data}, {config.steps:,} steps of {config.batch_size}")
    print(processes.described())
    for line in _doubts(config):
        print(line)
    checkpoint, not_used = run_checkpoints.newest_good(folder)
    for line in not_used:
        print(line)
    if checkpoint:
        freeze.check_same_frozen(table, folder / "freeze.json")
        print(f"going on from {checkpoint} (--no-resume to start over)")
    else:
        freeze.write(table, folder / "freeze.json")
        write_config(config, command)
    return checkpoint


def _doubts(config: RunConfig) -> list[str]:
    """Settings that can be meant, but hardly are."""
    found = []
    if isinstance(config, Stage1Config) and config.batch_size * PartialState().num_processes == 1:
        found.append("warning: a batch of one pair has nothing to be told from (itc_loss is 0); raise --batch-size")
    if config.steps <= config.warmup_steps:
        found.append(f"warning: {config.steps} steps end within --warmup-steps {config.warmup_steps}, below the peak")
    return found


def _cached(
    config: RunConfig, model: Any, train: Any, collator: Callable, image_size: int
) -> tuple[Dataset, Callable]:
    """The data set and the collator of a run that takes what the frozen encoders say from a cache, which is filled first."""
    assert config.feature_cache is not None
    masked, source = _reconstructs(model), f"{config.data} {config.images or ''}"
    model.xformer.to(PartialState().device)
    cache = FeatureCache(config.feature_cache, model, masked, source, image_size, uses_bf16(config))
    broken = cache.fill(model, train, collator, config.num_workers)
    train = train if masked else datasets.undecoded(train, broken)
    return train, WithFeatures(collator, cache, pixels_needed=masked)


def _reconstructs(model: Any) -> bool:
    """Whether this stage hides a part of every image and has it reconstructed."""
    stage1 = isinstance(model, XFormerForPreTraining)
    return model.config.reconstruction if stage1 else model.config.reconstruction_in_stage2


def _texts(folder: Path, pixels: torch.Tensor, held_out: Records, write: Write) -> Ask:
    """What HeldOut calls: a record with the model's text for each held-out image. Saves the images."""
    shown = []
    for number, record in enumerate(held_out):
        image = f"samples/{number}.png"
        if processes.is_first():
            record["image"].save(folder / image)
        question = {"question": record["question"]} if "question" in record else {}
        reference = record["answer"] if question else record["caption"]
        shown.append({"id": record["id"], "image": image, **question, "reference": reference})

    def texts(model: nn.Module) -> Records:
        written = write(model, pixels.to(next(model.parameters()).device))
        return [{**record, "text": text.strip()} for record, text in zip(shown, written, strict=True)]

    return texts


def _draw(model: Any, pixels: torch.Tensor) -> Draw | None:
    """What HeldOut calls, where this training reconstructs: the masked held-out images, reconstructed."""
    if not _reconstructs(model):
        return None

    def draw(model: Any) -> Image.Image:
        on_device = pixels.to(next(model.parameters()).device)
        images = reconstructions(model, on_device, model.config.mask_ratio, seed=0)
        del images["hidden"]
        return panel_grid(to_panels(images))

    return draw


def _finish(folder: Path, trainer: XFormerTrainer, processor: Any, start: int, seconds: float) -> None:
    """Write summary.json and the model, whole or not at all; then the checkpoints have done their work."""
    weights = trainer.whole_weights()  # which all processes must ask for
    if not trainer.is_world_process_zero():
        return
    summary = {
        "steps": trainer.state.global_step,
        "steps_in_this_session": trainer.state.global_step - start,
        "seconds_in_this_session": round(seconds, 2),
        "share_of_time_waiting_for_data": round(trainer.data_seconds / seconds, 4),
        "processes": trainer.args.world_size,
        "bf16": trainer.args.bf16,
        "threads": torch.get_num_threads(),
        "device": str(trainer.args.device),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    partial = folder / "partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(partial, state_dict=weights)
    processor.save_pretrained(partial)
    partial.rename(folder / "model")
    _delete_checkpoints(folder)
    print(f"finished: {folder}/model")


def _delete_checkpoints(folder: Path) -> None:
    for pattern in ("checkpoint-*", "damaged-*"):
        for checkpoint in folder.glob(pattern):
            shutil.rmtree(checkpoint)
