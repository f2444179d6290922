"""The two stages of training, from a configuration to a finished run folder.

A run's folder: config.json (the resolved configuration), freeze.json, log.jsonl, samples.jsonl with samples/ (the
held-out pictures), tensorboard/, checkpoint-N/ while it runs; and when it is finished summary.json and model/.
"""

import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset, Subset
from torch.utils.tensorboard import SummaryWriter
from transformers import set_seed

from xformer_mllm.checkpoints import start_generation, start_pretraining
from xformer_mllm.data.captions import CaptionFolder
from xformer_mllm.data.easy_vqa import EasyVqaCaptions, EasyVqaQuestions
from xformer_mllm.data.questions import CAPTION_PROMPT, QUESTION_PROMPT, ByPicture
from xformer_mllm.data.scenes import SceneCaptions, SceneQuestions
from xformer_mllm.model.images import load_image
from xformer_mllm.train import freeze
from xformer_mllm.train.batches import Stage1Collator, Stage2Collator
from xformer_mllm.train.callbacks import LOG, SAMPLES, HeldOutTexts, Progress, RunLog
from xformer_mllm.train.config import (
    CONFIG_FILE,
    RunConfig,
    Stage1Config,
    Stage2Config,
    differences,
    read_config,
    write_config,
)
from xformer_mllm.train.trainer import XFormerTrainer, newest_checkpoint

HELD_OUT_PICTURES = 4
STANDARDISED_OVER = 256  # pictures, whose tokens' statistics the fresh layer norms start with
SAMPLE_TOKENS = 20

Records = list[dict[str, Any]]
Write = Callable[[nn.Module, torch.Tensor], list[str]]  # model, pixels of the held-out pictures -> a text for each


def run_stage1(config: Stage1Config) -> Path:
    """Train stage 1 and return the run's folder.

    Raises ValueError for an unknown variant or data set and where output_dir holds another run, FileNotFoundError for
    a missing folder, NonFiniteError at nan.
    """
    if _is_finished(config, "train stage1"):
        return config.output_dir
    set_seed(config.seed)
    processor: Any
    model, processor = start_pretraining(config.variant, config.seed)
    train, held_out = _captions(config)
    first: list[dict[str, Any]] = [train[index] for index in range(min(STANDARDISED_OVER, len(train)))]  # type: ignore[arg-type]
    model.xformer.standardise(processor(images=[record["image"] for record in first])["pixel_values"])
    tokenizer = processor.qformer_tokenizer

    def write(model: nn.Module, pixels: torch.Tensor) -> list[str]:
        ids = model.caption(pixels, tokenizer.sep_token_id, max_new_tokens=SAMPLE_TOKENS)  # type: ignore[operator]
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    collator = Stage1Collator(processor, config.max_text_tokens)
    return _run(config, "train stage1", model, processor, train, held_out, collator, write)


def run_stage2(config: Stage2Config) -> Path:
    """Train stage 2 on the model of a stage-1 run and return the run's folder. Raises as `run_stage1`."""
    if _is_finished(config, "train stage2"):
        return config.output_dir
    set_seed(config.seed)
    model, processor = start_generation(
        _pretrained(config), config.llm, config.seed, config.instruction_aware and config.text == "questions"
    )
    train, held_out = _questions(config) if config.text == "questions" else _captions(config)
    end = model.generation_config.eos_token_id
    collator = Stage2Collator(processor, end if isinstance(end, int) else end[0], config.max_text_tokens)
    asked = [QUESTION_PROMPT.format_map(r) if "question" in r else CAPTION_PROMPT for r in held_out]

    def write(model: nn.Module, pixels: torch.Tensor) -> list[str]:
        text = processor(text=asked).to(pixels.device)
        tokens = model.generate(pixels, **text, max_new_tokens=SAMPLE_TOKENS, do_sample=False)  # type: ignore[operator]
        return processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return _run(config, "train stage2", model, processor, train, held_out, collator, write)


def _captions(config: RunConfig) -> tuple[Dataset, Records]:
    """Pictures with captions to train on, and a few held-out ones."""
    if config.data == "scenes":
        return SceneCaptions("train", config.train_size), _first(SceneCaptions("validation", HELD_OUT_PICTURES))
    if config.data == "easy-vqa":
        return _at_most(EasyVqaCaptions("train"), config.train_size), _first(EasyVqaCaptions("validation"))
    _require_folder(config.data)
    train = CaptionFolder(config.data, load_image, "train")
    return _at_most(train, config.train_size), _first(CaptionFolder(config.data, load_image, "validation"))


def _questions(config: Stage2Config) -> tuple[Dataset, Records]:
    """Questions with answers to train on, picture by picture, and one on each of a few held-out pictures."""
    if config.data == "scenes":
        each = config.questions_per_picture
        scenes = SceneQuestions("train", config.train_size, questions_per_scene=each)
        groups = [list(range(first, first + each)) for first in range(0, len(scenes), each)]
        return ByPicture(scenes, groups), _first(
            SceneQuestions("validation", HELD_OUT_PICTURES, questions_per_scene=1)
        )
    if config.data == "easy-vqa":
        questions = EasyVqaQuestions("train")
        places: dict[str, list[int]] = {}
        for place, question in enumerate(questions.questions):
            places.setdefault(question.image_id, []).append(place)
        return ByPicture(questions, list(places.values())[: config.train_size]), _first(EasyVqaQuestions("validation"))
    _require_folder(config.data)
    raise ValueError(f"{config.data}: a folder of pictures has captions, not questions; use --text captions")


def _require_folder(data: str) -> None:
    if not Path(data).is_dir():
        raise FileNotFoundError(f"--data {data}: neither scenes nor easy-vqa, nor a folder that exists")


def _at_most(dataset: Dataset, size: int) -> Dataset:
    return Subset(dataset, range(size)) if len(dataset) > size else dataset  # type: ignore[arg-type]


def _first(dataset: Dataset) -> Records:
    return [dataset[index] for index in range(min(HELD_OUT_PICTURES, len(dataset)))]  # type: ignore[arg-type]


def _pretrained(config: Stage2Config) -> Path:
    """The stage-1 model's folder.

    Raises FileNotFoundError if there is none, ValueError if it is of another variant than asked for.
    """
    run = config.from_pretraining
    if not (run / "model").is_dir():
        if (run / "model.safetensors").is_file():
            return run
        why = "that run is not finished" if newest_checkpoint(run) else "no stage-1 model there"
        raise FileNotFoundError(f"{run}: {why}; run: xformer train stage1 --output-dir {run}")
    if config.variant is not None:
        trained = read_config(run / CONFIG_FILE, Stage1Config, "train stage1").variant
        if trained != config.variant:
            raise ValueError(f"{run}: holds the variant {trained}, not {config.variant}")
    return run / "model"


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
        print(f"{folder}: this run is finished; nothing to do (--no-resume to train it anew)")
        return True
    return False


def _clear(folder: Path) -> None:
    """Delete what a run wrote into its folder, and nothing else."""
    for pattern in ("checkpoint-*", "partial-*", "model", "tensorboard", "samples"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    for name in (LOG, SAMPLES, "freeze.json", "summary.json", "stopped.json", CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)


def _run(
    config: RunConfig,
    command: str,
    model: Any,
    processor: Any,
    train: Dataset,
    held_out: Records,
    collator: Stage1Collator | Stage2Collator,
    write: Write,
) -> Path:
    """What both stages share: freeze, train or go on, save."""
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stopped.json").unlink(missing_ok=True)
    model.freeze()
    table = freeze.freeze_table(model)
    print(freeze.show(table))
    print(f"{len(train):,} training records of {config.data}, {config.steps:,} steps of {config.batch_size}")  # type: ignore[arg-type]
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        freeze.check_same_frozen(table, folder / "freeze.json")
        print(f"going on from {checkpoint} (--no-resume to start over)")
    else:
        freeze.write(table, folder / "freeze.json")
        write_config(config, command)
    start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    with SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1) as tensorboard:
        texts = HeldOutTexts(folder, tensorboard, config.sample_steps, _sampler(folder, processor, held_out, write))
        callbacks = [Progress(), RunLog(folder, tensorboard), texts]
        trainer = XFormerTrainer(model, config, train, collator, callbacks)
        began = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        _finish(folder, trainer, processor, start, time.perf_counter() - began)
    return folder


def _sampler(folder: Path, processor: Any, held_out: Records, write: Write) -> Callable[[nn.Module], Records]:
    """What HeldOutTexts calls: a record with the model's text for each held-out picture. Saves the pictures."""
    pixels = processor(images=[record["image"] for record in held_out])["pixel_values"]
    (folder / "samples").mkdir(exist_ok=True)
    shown = []
    for number, record in enumerate(held_out):
        picture = f"samples/{number}.png"
        record["image"].save(folder / picture)
        question = {"question": record["question"]} if "question" in record else {}
        reference = record["answer"] if question else record["caption"]
        shown.append({"id": record["id"], "picture": picture, **question, "reference": reference})

    def texts(model: nn.Module) -> Records:
        written = write(model, pixels.to(next(model.parameters()).device))
        return [{**record, "text": text.strip()} for record, text in zip(shown, written, strict=True)]

    return texts


def _finish(folder: Path, trainer: XFormerTrainer, processor: Any, start: int, seconds: float) -> None:
    """Write summary.json and the model, whole or not at all; then the checkpoints have done their work."""
    summary = {
        "steps": trainer.state.global_step,
        "steps_in_this_session": trainer.state.global_step - start,
        "seconds_in_this_session": round(seconds, 2),
        "share_of_time_waiting_for_data": round(trainer.data_seconds / seconds, 4),
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
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(folder / "model")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    print(f"finished: {folder}/model")
