"""Assemble the two stages of training: from a configuration to model, data, collator and a finished run.

`run_folder.py` says what the run's folder holds; `loop.py` has the training loop.
"""

import importlib.util
import platform
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
from xformer_mllm.train import datasets, freeze, run_folder
from xformer_mllm.train.batches import Stage1Collator, Stage2Collator
from xformer_mllm.train.config import (
    CONFIG_FILE,
    RunConfig,
    Stage1Config,
    Stage2Config,
    read_config,
    write_config,
)
from xformer_mllm.train.datasets import Records
from xformer_mllm.train.feature_cache import FeatureCache, WithFeatures
from xformer_mllm.train.logs import RunLog, Samples
from xformer_mllm.train.loop import TrainingLoop, start_accelerator, uses_bf16
from xformer_mllm.variants import variant_config, with_settings

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
    if not processes.on_first(lambda: run_folder.prepare(config, "train stage1")):
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
    processes.take_weights_of_first(model)  # with a stream, each process standardises on other images
    tokenizer = processor.qformer_tokenizer

    def write(model: nn.Module, pixels: torch.Tensor) -> list[str]:
        ids = model.caption(pixels, tokenizer.sep_token_id, max_new_tokens=SAMPLE_TOKENS)  # type: ignore[operator]
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    return _run(config, "train stage1", model, processor, train, held_out, collator, write)


def _start(config: Stage1Config) -> tuple[Any, Any]:
    if config.start_from is not None:
        return continue_pretraining(config.start_from, config.variant)
    try:
        base = defaults.config(config.encoders)
    except (ValueError, OSError) as error:
        raise ValueError(f"--encoders {error}") from error
    try:
        with_settings(base, config.model_settings)  # report a wrong one as such, not as the encoder's error
    except ValueError as error:
        raise ValueError(f"--model-settings {error}") from error
    name = config.second_encoder
    own: dict[str, Any] = {"settings": config.model_settings, "encoders": config.encoders}
    if name is None:
        return defaults.start_pretraining(config.variant, config.seed, **own)
    if Path(name).is_file():
        raise ValueError(
            f"--second-encoder {name}: a file; pass a folder or a Hub id, or convert a MAE's .pth file with "
            "`xformer convert --mae` and pass its folder to --start-from"
        )
    if not Path(name).exists():
        check_on_hub("--second-encoder", name)
    variant_config(config.variant, base)  # report an unknown variant as such, not as the encoder's error
    try:
        return defaults.start_pretraining(config.variant, config.seed, name, **own)
    except AttributeError as error:  # a language model lacks a vision tower's settings
        raise ValueError(f"--second-encoder {name}: not a vision tower ({error})") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"--second-encoder {name}: {error}") from error


def run_stage2(config: Stage2Config) -> Path:
    """Train stage 2 on the model of a stage-1 run and return the run's folder. Raises as `run_stage1`."""
    processes.join()
    if not processes.on_first(lambda: run_folder.prepare(config, "train stage2")):
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
        prompt = 1 if processor.encoder_decoder else text["input_ids"].shape[1]
        return processor.tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True)

    return _run(config, "train stage2", model, processor, train, held_out, collator, write)


def _pretrained(config: Stage2Config) -> Path:
    """Find the folder of the stage-1 model.

    Raises FileNotFoundError if there is none, ValueError if it is not of --variant.
    """
    run = config.from_pretraining
    if not (run / "model").is_dir():
        if any(run.glob("model*.safetensors")):
            return run
        if below := sorted(path.parent for path in run.glob("*/model") if path.is_dir()):
            raise FileNotFoundError(f"{run}: no stage-1 model there; did you mean --from-pretraining {below[0]}?")
        why = "that run is not finished" if run_folder.checkpoints(run) else "no stage-1 model there"
        if run.is_dir() and any(run.iterdir()) and not (run / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{run}: {why}; give the folder of a finished run of `xformer train stage1`")
        raise FileNotFoundError(f"{run}: {why}; run: xformer train stage1 --output-dir {run}")
    if config.variant is not None:
        trained = read_config(run / CONFIG_FILE, Stage1Config, "train stage1").variant
        if trained != config.variant:
            raise ValueError(f"{run}: holds the variant {trained}, not {config.variant}")
    return run / "model"


def _with_language_model(config: Stage2Config, folder: Path) -> Path:
    """Return `folder` after checking that a language model is available: the model's own, else --llm.

    Raises ValueError if both are given, or if --llm is not found.
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
    """Run what both stages share: freeze, train or resume, save."""
    folder, text_collator = config.output_dir, collator
    model.freeze()
    checkpoint = processes.on_first(lambda: _begin(config, command, model, train))
    start = run_folder.step_of(checkpoint) if checkpoint else 0
    if config.feature_cache is not None:
        train, collator = _cached(config, model, train, collator, _image_size(processor))
    pixels = processor(images=[record["image"] for record in held_out])["pixel_values"]
    tensorboard = None
    if processes.is_first() and "tensorboard" in config.report_to:
        tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
    trackers: list[str] = [name for name in config.report_to if name != "tensorboard"]
    accelerator = start_accelerator(trackers)
    if trackers:
        accelerator.init_trackers("xformer", init_kwargs={name: {"name": folder.name} for name in trackers})
    run_log = RunLog(folder, config.steps, tensorboard, accelerator.log)
    samples = Samples(folder, tensorboard, _texts(folder, pixels, held_out, write), _draw(model, pixels))
    loop = TrainingLoop(
        accelerator, model, config, train, collator, run_log, samples, _report_truncated(text_collator)
    )
    began = time.perf_counter()
    try:
        loop.train(checkpoint)
    except KeyboardInterrupt:
        if processes.is_first():
            print(_saved(folder))
        raise
    finally:
        accelerator.end_training()
        if tensorboard is not None:
            tensorboard.close()
    _finish(folder, loop, processor, start, time.perf_counter() - began)
    return folder


def _report_truncated(collator: Any) -> Callable[[], None]:
    """A function that prints how many texts were truncated since now."""
    before = collator.cut.count.value  # of the images that the run standardised on

    def report() -> None:
        if processes.is_first() and (count := collator.cut.count.value - before):
            print(f"{count:,} texts of the first epoch were truncated to --max-text-tokens {collator.cut.limit}")

    return report


def _saved(folder: Path) -> str:
    """What is left of a run that was interrupted."""
    newest = next(iter(run_folder.checkpoints(folder)), None)
    return f"saved {newest}; run the same command to resume" if newest else "no step was completed; nothing was saved"


def _begin(config: RunConfig, command: str, model: Any, train: Dataset) -> Path | None:
    """Set up the run's folder, print a summary of the run and return the checkpoint to resume from, if any."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--report-to {name}: that package is not installed; pip install {name}")
    if config.feature_cache is not None and isinstance(train, IterableDataset):
        raise ValueError(f"--feature-cache: {config.data} is a stream of unknown length; leave --feature-cache out")
    folder = config.output_dir
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    run_folder.delete_reports(folder)
    table = freeze.freeze_table(model)
    print(freeze.show(table))
    print(f"{datasets.described(train)} of {config.data}, {config.steps:,} steps of {config.batch_size}")
    print(processes.described())
    for line in _warnings(config, train):
        print(line)
    checkpoint, not_used = run_folder.newest_good(folder)
    for line in not_used:
        print(line)
    if checkpoint:
        freeze.check_same_frozen(table, folder / "freeze.json")
        print(f"resuming from {checkpoint} (--no-resume starts over)")
    else:
        freeze.write(table, folder / "freeze.json")
        run_folder.write_start(config)
        write_config(config, command)
    return checkpoint


def _warnings(config: RunConfig, train: Dataset) -> list[str]:
    """Warn about settings that are valid but probably not meant."""
    found = []
    joint = config.batch_size * PartialState().num_processes
    if isinstance(config, Stage1Config) and joint == 1:
        found.append("warning: a batch of one pair has no negatives (itc_loss is 0); raise --batch-size")
    if not isinstance(train, IterableDataset) and (size := len(train)) < joint:  # type: ignore[arg-type]
        found.append(
            f"warning: the training data ({size} images) does not fill one batch (--batch-size {config.batch_size}"
            f" x {PartialState().num_processes} processes); lower --batch-size"
        )
    if config.steps <= config.warmup_steps:
        found.append(f"warning: {config.steps} steps end within --warmup-steps {config.warmup_steps}, below the peak")
    return found


def _cached(
    config: RunConfig, model: Any, train: Any, collator: Callable, image_size: int
) -> tuple[Dataset, Callable]:
    """Fill the feature cache; return the data set and collator that read from it."""
    assert config.feature_cache is not None
    masked, source = _reconstructs(model), f"{config.data} {config.images or ''}"
    model.xformer.to(PartialState().device)
    cache = FeatureCache(config.feature_cache, model, masked, source, image_size, uses_bf16(config))
    broken = cache.fill(model, train, collator, processes.loaders(config.num_workers))
    train = train if masked else datasets.undecoded(train, broken)
    return train, WithFeatures(collator, cache, pixels_needed=masked)


def _reconstructs(model: Any) -> bool:
    """Whether this stage masks a part of every image and reconstructs it."""
    stage1 = isinstance(model, XFormerForPreTraining)
    return model.config.reconstruction if stage1 else model.config.reconstruction_in_stage2


def _texts(folder: Path, pixels: torch.Tensor, held_out: Records, write: Write) -> Ask:
    """A function that returns one record with the model's text per held-out image. Saves the images."""
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
    """A function that reconstructs the masked held-out images, or None if this stage does not reconstruct."""
    if not _reconstructs(model):
        return None

    def draw(model: Any) -> Image.Image:
        on_device = pixels.to(next(model.parameters()).device)
        images = reconstructions(model, on_device, model.config.mask_ratio, seed=0)
        del images["hidden"]
        return panel_grid(to_panels(images))

    return draw


def _finish(folder: Path, loop: TrainingLoop, processor: Any, start: int, seconds: float) -> None:
    """Save the summary and the model."""
    weights = loop.whole_weights()  # a collective: all processes take part
    if not processes.is_first():
        return
    summary = {
        "steps": loop.step,
        "steps_in_this_session": loop.step - start,
        "seconds_in_this_session": round(seconds, 2),
        "share_of_time_waiting_for_data": round(loop.data_seconds / seconds, 4),
        "processes": loop.accelerator.num_processes,
        "bf16": loop.bf16,
        "threads": torch.get_num_threads(),
        "device": str(loop.accelerator.device),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    run_folder.save_model(folder, loop.whole_model, processor, weights, summary)
