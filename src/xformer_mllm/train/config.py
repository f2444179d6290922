"""What a training run is made of: every default of `xformer train stage1|stage2`, in one place.

tyro turns a dataclass into the command's flags and the text under a field into its `--help`. The resolved
configuration is written to `config.json` beside the run's results; `--config THAT_FILE` runs it again. Defaults are
those of the embedded world (48x48 scenes, two CPU cores); `recipes/` names other settings.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

CONFIG_FILE = "config.json"

# These do not change what is learned, so a run may go on with other values of them.
NOT_LEARNED = {
    "output_dir", "resume", "save_steps", "save_minutes", "save_total_limit", "sample_steps", "num_workers", "report_to",
    "feature_cache",
}  # fmt: skip

SCENES = 24_000

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What both stages share."""

    data: str = "scenes"
    """scenes (the embedded world), easy-vqa, or your own: a folder, .json, .jsonl, .tar shards, hf:NAME (docs/data.md)."""
    images: Path | None = None
    """The folder of the images that a .json or .jsonl names, if it is not beside that file."""
    train_size: int | None = None
    """At most this many training images; by default all there are, and 24,000 scenes."""
    augment: Literal["crop+flip", "crop", "none"] = "crop+flip"
    """Of your own images: a random crop of 50-100 % of the area, and every second time flipped (BLIP-2)."""
    clean_captions: bool = False
    """Of your own images: captions in lower case, without .!"()*#:;~ and at most 50 words long (BLIP-2)."""
    output_dir: Path = Path("runs/train")
    """The run's folder: config.json, log.jsonl, samples.jsonl, freeze.json, tensorboard/, and at the end model/."""
    resume: bool = True
    """Go on from the newest complete checkpoint in output_dir; --no-resume deletes what is there and starts over."""
    seed: int = 0
    """Of the initial weights, the order of the data, the masks, dropout and hard negatives."""

    steps: int = 720
    """Optimiser steps; the cosine schedule ends there."""
    batch_size: int = 48
    """Images per step and device."""
    gradient_accumulation_steps: int = 1
    """Batches per optimiser step (the contrastive loss sees one batch at a time)."""
    learning_rate: float = 1.5e-3
    """Peak, after the warm-up."""
    min_learning_rate: float = 0.0
    """What the cosine falls to."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Of matrices; biases and other one-dimensional parameters have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 for never."""
    bf16: Literal["auto", "yes", "no"] = "auto"
    """Mixed precision; auto: where the hardware has it (many GPUs; CPUs with AMX or AVX-512 BF16)."""

    max_text_tokens: int = 32
    """Longer captions, questions and answers are cut (and it is said once)."""
    feature_cache: Path | None = None
    """Keep what the frozen encoders make of the images in this folder (for whole images: --augment none)."""
    num_workers: int = 0
    """Processes that prepare batches; 0: the training process itself."""
    logging_steps: int = 20
    """Losses and accuracies are logged as averages over this many steps."""
    save_steps: int = 200
    """A checkpoint after every so many steps."""
    save_minutes: float = 30.0
    """A checkpoint also when so many minutes have passed since the last one (looked at every logging_steps steps)."""
    save_total_limit: int = 2
    """Checkpoints kept while training; a finished run keeps its model only."""
    sample_steps: int = 200
    """Texts, and reconstructions, of fixed held-out images after every so many steps."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the log goes beside log.jsonl and the terminal; wandb and trackio are packages of their own."""

    def __post_init__(self) -> None:
        """Raises ValueError, in one line, for a number that cannot be."""
        if self.train_size is None and self.data == "scenes":
            object.__setattr__(self, "train_size", SCENES)
        if self.train_size is not None and self.train_size < 1:
            raise ValueError(f"train_size must be at least 1, not {self.train_size}")
        at_least_one = ("steps", "batch_size", "gradient_accumulation_steps", "max_text_tokens")
        for name in (*at_least_one, "logging_steps", "save_steps", "save_total_limit", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup_steps", "min_learning_rate", "weight_decay", "max_grad_norm", "num_workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.feature_cache is not None and self.augment != "none" and self.data not in ("scenes", "easy-vqa"):
            raise ValueError("feature_cache keeps the features of whole images; with it, set --augment none")
        for name in ("learning_rate", "save_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}, the peak"
            )


@dataclass(frozen=True, kw_only=True)
class Stage1Config(RunConfig):
    """Stage 1: representation learning by ITC, ITM, ITG and reconstruction, with the encoders frozen."""

    variant: str = "xformer"
    """Which model: qformer, xformer, concat, early_cross_attention, clip_shallow, no_reconstruction,
    reconstruction_in_stage2 (rows of the paper's tables), random_mae, dinov2 (variants.py says what each is)."""
    start_from: Path | None = None
    """Folder of `xformer convert`, or of a model trained before; by default the embedded world's encoders."""
    second_encoder: str | None = None
    """Folder or hub id of another MAE or vision tower in place of the embedded world's MAE."""
    output_dir: Path = Path("runs/stage1")
    """The run's folder: config.json, log.jsonl, samples.jsonl, freeze.json, tensorboard/, and at the end model/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_from is not None and self.second_encoder is not None:
            raise ValueError("second_encoder belongs to the embedded world's start; give --mae to `xformer convert`")


@dataclass(frozen=True, kw_only=True)
class Stage2Config(RunConfig):
    """Stage 2: the fused queries become a soft prompt of a frozen language model."""

    variant: str | None = None
    """The variant of the stage-1 model, where it should be checked; the model itself comes from there."""
    from_pretraining: Path = Path("runs/stage1")
    """The folder of a finished stage-1 run, or of its model. Or one of stage 2, or of `xformer convert --llm`: its own
    language model then goes on, without --llm."""
    llm: str = "opt"
    """The frozen language model: opt (tiny, shipped), smollm2, or a folder or hub id of a causal model or an encoder-decoder
    (docs/language-models.md)."""
    text: Literal["captions", "questions"] = "captions"
    """What is learned to be said: captions alone, as in the paper (questions are then zero-shot), or answers."""
    instruction_aware: bool = True
    """With --text questions: the queries read the question, too, as in InstructBLIP (the paper's do not)."""
    questions_per_image: int = 4
    """With --text questions: how many on each image; of a source of your own at most so many, drawn anew each time."""
    chat_template: bool = False
    """Speak to the language model by its chat template (for instruct models)."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank on the language model, too (package peft); 0: none, as in the paper."""
    output_dir: Path = Path("runs/stage2")
    """The run's folder: config.json, log.jsonl, samples.jsonl, freeze.json, tensorboard/, and at the end model/."""
    steps: int = 800
    """Optimiser steps; the cosine schedule ends there."""
    batch_size: int = 24
    """Images per step and device, each encoded once and with all its questions."""
    learning_rate: float = 6e-4
    """Peak, after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's (BLIP-2's paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.questions_per_image < 1:
            raise ValueError(f"questions_per_image must be at least 1, not {self.questions_per_image}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must not be negative, but is {self.lora_rank}")


def write_config(config: Any, command: str) -> None:
    """Write `config` to its output_dir, whole or not at all. `command` names the command that it belongs to."""
    fields = {"command": command, **dataclasses.asdict(config)}
    partial = config.output_dir / f"{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(fields, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(config.output_dir / CONFIG_FILE)


def read_config(path: Path, kind: type[Config], command: str) -> Config:
    """The configuration in a file that `write_config` wrote, or in a run's folder.

    Raises FileNotFoundError, or ValueError if the file is not a configuration of `command`.
    """
    if path.is_dir():
        path = path / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        written_by = fields.pop("command")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a run's configuration; give the {CONFIG_FILE} of a run's folder") from error
    if written_by != command:
        raise ValueError(f"{path}: the configuration of `xformer {written_by}`, not of `xformer {command}`")
    hints = get_type_hints(kind)
    if unknown := sorted(set(fields) - set(hints)):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; fields: {', '.join(sorted(hints))}")
    return kind(**{name: _as_field(hints[name], value) for name, value in fields.items()})


def _as_field(hint: Any, value: Any) -> Any:
    """JSON's strings and lists back as the paths and tuples they were."""
    if hint in (Path, Path | None):
        return value if value is None else Path(value)
    return tuple(value) if isinstance(value, list) else value


def differences(one: Any, other: Any) -> list[str]:
    """What would be learned differently: "learning_rate 0.001, not 0.002" for each field, empty if nothing would."""
    return [
        f"{field.name} {getattr(one, field.name)}, not {getattr(other, field.name)}"
        for field in dataclasses.fields(one)
        if field.name not in NOT_LEARNED and getattr(one, field.name) != getattr(other, field.name)
    ]
