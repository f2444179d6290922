"""Training arguments of `xformer train stage1|stage2`, with their defaults.

tyro turns each dataclass into the command's flags; the text under a field is its `--help`. The resolved configuration
is saved as `config.json` in the run's folder and can be run again with `--config`. The defaults fit the embedded world
(48x48 scenes, two CPU cores); `recipes/` has settings for other data.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from xformer_mllm.commands import DATA, DRAWN, flag_of
from xformer_mllm.files import write_whole

CONFIG_FILE = "config.json"

# These do not change what is learned, so a run may be resumed with other values.
NOT_LEARNED = {
    "output_dir", "resume", "save_steps", "save_minutes", "save_total_limit", "sample_steps", "num_workers", "report_to",
    "feature_cache",
}  # fmt: skip

SCENES_SIZE = 24_000

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Arguments of both stages."""

    data: str = "scenes"
    """Training data: scenes (embedded world), scenes-detailed (with captions that leave out less), photographs (made of
    cut-outs), easy-vqa, a folder, .json, .jsonl, .csv, .tar or hf:NAME (docs/data.md)."""
    images: Path | None = None
    """Image folder of a .json, .jsonl or .csv file. Defaults to the folder of that file."""
    train_size: int | None = None
    """Maximum number of training images. Defaults to all; 24,000 for scenes and photographs."""
    augment: Literal["crop+flip", "crop", "none"] = "crop+flip"
    """Augmentation of your own images, as in BLIP-2: random crop of 50-100% of the area, horizontal flip of every other."""
    clean_captions: bool = False
    """Lower-case the captions of your own images, remove .!"()*#:;~ and keep the first 50 words, as BLIP-2."""
    output_dir: Path = Path("runs/train")
    """Folder of the run: config.json, log.jsonl, samples.jsonl, freeze.json, tensorboard/ and the final model/."""
    resume: bool = True
    """Resume from the newest complete checkpoint in output_dir. --no-resume deletes the run there and starts over."""
    seed: int = 0
    """Random seed of the initial weights, data order, masks, dropout and hard negatives."""

    steps: int = 720
    """Total number of optimizer steps, and the length of the cosine schedule."""
    batch_size: int = 48
    """Batch size per device, in images."""
    gradient_accumulation_steps: int = 1
    """Number of batches per optimizer step. The contrastive loss sees one batch at a time."""
    learning_rate: float = 1.5e-3
    """Peak learning rate, reached after `warmup_steps`."""
    min_learning_rate: float = 0.0
    """Final learning rate of the cosine schedule."""
    warmup_steps: int = 50
    """Number of steps of linear warm-up from 0 to `learning_rate`."""
    weight_decay: float = 0.05
    """Weight decay, applied to weight matrices but not to biases and other one-dimensional parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas (beta1, beta2)."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm for gradient clipping; 0 disables clipping."""
    bf16: Literal["auto", "yes", "no"] = "auto"
    """Train with bf16 autocast. auto: if the hardware supports it (GPUs; CPUs with AMX or AVX-512 BF16)."""

    max_text_tokens: int = 32
    """Maximum number of tokens of captions and answers, and of words of questions. Longer texts are truncated."""
    group_by_length: bool = False
    """Put texts of like lengths into a batch, so that less of it is padding. Needs a list of images of your own."""
    feature_cache: Path | None = None
    """Folder to cache the outputs of the frozen encoders in. Your own images need --augment none."""
    num_workers: int | None = None
    """Number of processes that load data; 0 loads it in the training process. Default: 4 for each GPU, 0 on a CPU."""
    logging_steps: int = 20
    """Number of steps between two logs. Losses and accuracies are averages over these steps."""
    save_steps: int = 200
    """Number of steps between two checkpoints."""
    save_minutes: float = 30.0
    """Also save a checkpoint this many minutes after the last one, checked every `logging_steps` steps."""
    save_total_limit: int = 2
    """Number of checkpoints to keep during training. A finished run keeps its model only."""
    sample_steps: int = 200
    """Number of steps between two samples: texts and reconstructions of fixed held-out images."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Trackers to log to, besides log.jsonl and the terminal. wandb and trackio must be installed."""

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid value."""
        if self.train_size is None and self.data in DRAWN:
            object.__setattr__(self, "train_size", SCENES_SIZE)
        if self.train_size is not None and self.train_size < 1:
            raise ValueError(f"--train-size must be at least 1, not {self.train_size}")
        at_least_one = ("steps", "batch_size", "gradient_accumulation_steps", "max_text_tokens")
        for name in (*at_least_one, "logging_steps", "save_steps", "save_total_limit", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag_of(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup_steps", "min_learning_rate", "weight_decay", "max_grad_norm", "num_workers", "seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{flag_of(name)} must not be negative, but is {getattr(self, name)}")
        if self.feature_cache is not None and self.augment != "none" and self.data not in DATA:
            raise ValueError("--feature-cache needs whole images; set --augment none")
        for name in ("learning_rate", "save_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{flag_of(name)} must be positive, not {getattr(self, name)}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"--min-learning-rate {self.min_learning_rate} is above the peak, --learning-rate {self.learning_rate}"
            )

    @property
    def starts_from(self) -> Path | None:
        """Folder of the model, its run or the encoders that this run starts from; None for the shipped encoders."""
        return None


@dataclass(frozen=True, kw_only=True)
class Stage1Config(RunConfig):
    """Stage 1: learn representations by ITC, ITM, ITG and reconstruction, with frozen encoders."""

    variant: str = "xformer"
    """Model variant: qformer, xformer, concat, early_cross_attention, clip_shallow, no_reconstruction,
    reconstruction_in_stage2 (rows of the paper's tables), random_mae, dinov2 (variants.py describes them)."""
    start_from: Path | None = None
    """Model to start from: a folder of `xformer convert` or a trained model. Defaults to the embedded world's encoders."""
    encoders: Path | None = None
    """Folder with clip/, mae/ and qformer_tokenizer/, written by `xformer train encoders`; replaces the shipped ones."""
    second_encoder: str | None = None
    """Folder or Hub id of an MAE or another vision tower that replaces the embedded world's MAE."""
    model_settings: tuple[str, ...] = ()
    """Fields of the new model's configuration: num_query_tokens=32 fusion_blocks=2 qformer_config.hidden_size=160 ..."""
    output_dir: Path = Path("runs/stage1")
    """Folder of the run: config.json, log.jsonl, samples.jsonl, freeze.json, tensorboard/ and the final model/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_from is not None and self.encoders is not None:
            raise ValueError("--encoders cannot be combined with --start-from, whose model has its own")
        if self.start_from is not None and self.second_encoder is not None:
            raise ValueError("--second-encoder cannot be combined with --start-from; give --mae to `xformer convert`")
        if self.start_from is not None and self.model_settings:
            raise ValueError("--model-settings cannot be combined with --start-from, whose model has its own")

    @property
    def starts_from(self) -> Path | None:
        return self.start_from or self.encoders


@dataclass(frozen=True, kw_only=True)
class Stage2Config(RunConfig):
    """Stage 2: learn to use the fused queries as a soft prompt of a frozen language model."""

    variant: str | None = None
    """Expected variant of the stage-1 model; another one is an error. Defaults to no check."""
    from_pretraining: Path = Path("runs/stage1")
    """Folder of a finished stage-1 run or of its model. A model with a language model (a stage-2 run, or a folder of
    `xformer convert --llm`) keeps that language model and takes no --llm."""
    llm: str = "opt"
    """Frozen language model: opt (tiny, shipped), smollm2, or the folder or Hub id of a causal or encoder-decoder model
    (docs/language-models.md)."""
    text: Literal["captions", "questions"] = "captions"
    """Training target: captions, as in the paper (question answering is then zero-shot), or answers to questions."""
    instruction_aware: bool = True
    """With --text questions: let the queries read the question as well, as in InstructBLIP. The paper's do not."""
    questions_per_image: int = 4
    """With --text questions: number of questions per image. From your own data at most this many, resampled each epoch."""
    chat_template: bool = False
    """Format prompts with the chat template of the language model (for instruct models)."""
    lora_rank: int = 0
    """Rank of LoRA adapters trained on the language model (package peft); 0 trains none, as in the paper."""
    output_dir: Path = Path("runs/stage2")
    """Folder of the run: config.json, log.jsonl, samples.jsonl, freeze.json, tensorboard/ and the final model/."""
    steps: int = 800
    """Total number of optimizer steps, and the length of the cosine schedule."""
    batch_size: int = 24
    """Batch size per device, in images. Each image is encoded once, with all its questions."""
    learning_rate: float = 6e-4
    """Peak learning rate, reached after `warmup_steps`."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW betas (beta1, beta2), as in BLIP-2's paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.questions_per_image < 1:
            raise ValueError(f"--questions-per-image must be at least 1, not {self.questions_per_image}")
        if self.lora_rank < 0:
            raise ValueError(f"--lora-rank must not be negative, but is {self.lora_rank}")

    @property
    def starts_from(self) -> Path | None:
        return self.from_pretraining


def write_config(config: Any, command: str) -> None:
    """Write `config` to its output_dir. `command` is the command it belongs to, such as "train stage1"."""
    fields = {"command": command, **dataclasses.asdict(config)}
    write_whole(config.output_dir / CONFIG_FILE, json.dumps(fields, indent=2, default=str) + "\n")


def read_config(path: Path, kind: type[Config], command: str) -> Config:
    """Read a configuration from a file written by `write_config`, or from a run's folder.

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
    """Convert JSON strings and lists back to paths and tuples."""
    if hint in (Path, Path | None):
        return value if value is None else Path(value)
    return tuple(value) if isinstance(value, list) else value


def differences(one: Any, other: Any) -> list[str]:
    """List the fields that change what is learned, such as "learning_rate 0.001, not 0.002"."""
    return [
        f"{field.name} {getattr(one, field.name)}, not {getattr(other, field.name)}"
        for field in dataclasses.fields(one)
        if field.name not in NOT_LEARNED and getattr(one, field.name) != getattr(other, field.name)
    ]
