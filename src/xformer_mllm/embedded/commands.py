"""The arguments of the embedded world's commands: demo, study, train encoders, train lm, data export and data probe.

As in the package's `commands.py`, without the imports that the commands need.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from xformer_mllm.commands import flag_of


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train X-Former and the Q-Former baseline with equal budgets and compare them on held-out images."""

    data: Literal["scenes", "photographs", "easy-vqa"] = "scenes"
    """Images and questions: the embedded scenes, photographs (docs/data.md), or easy-VQA (needs the extra easy-vqa)."""
    encoders: Path | None = None
    """Folder written by `xformer train encoders`; replaces the shipped encoders. Required for photographs."""
    llm: str = "opt"
    """Frozen language model: opt (tiny, shipped), smollm2, or the folder or Hub id of a causal language model. For
    photographs: the folder opt/ that `xformer train lm --data photographs` wrote."""
    variants: tuple[str, ...] = ("qformer", "xformer")
    """Models to train. The first is the baseline of the comparison."""
    seed: int = 0
    """Seed of the initial weights, the batches and the masks."""
    output_dir: Path = Path("runs/demo")
    """Folder for the runs, the scores and the report."""
    stage1_steps: int = 720
    """Training steps of stage 1, per variant."""
    stage2_steps: int | None = None
    """Training steps of stage 2, per variant. Default: 800 with a tiny language model, 250 with another."""
    train_size: int = 24_000
    """Maximum number of training images."""
    test_size: int = 2_000
    """Number of held-out scenes or photographs to ask about. easy-VQA always uses all its test questions."""
    zero_shot: bool = False
    """Also run stage 2 on captions only and ask the questions zero-shot, as in the paper."""

    def __post_init__(self) -> None:
        """Raises ValueError for invalid settings."""
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError("--variants needs one or more different names")
        if self.data == "photographs" and (self.encoders is None or self.llm == "opt"):
            raise ValueError(
                "--data photographs needs --encoders and --llm of their own: `xformer train encoders --data photographs "
                "--output DIR` and `xformer train lm --data photographs --output DIR`, then --encoders DIR --llm DIR/opt"
            )
        for name in ("stage1_steps", "stage2_steps", "train_size", "test_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{flag_of(name)} must be at least 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Train and compare variants, seeds and settings from one file, on all cores; write table, figures and a page.

    The file is JSON: {"title": ..., "variants": ["qformer", "xformer"], "seeds": [0, 1, 2]}, and further fields of
    docs/training.md. Run the same command again to resume.
    """

    study: Annotated[Path, tyro.conf.Positional]
    """JSON file of the study."""
    output_dir: Path | None = None
    """Folder for the runs and the results. Default: runs/studies/NAME, NAME being the file's. Studies that share a folder
    share their runs."""


@dataclass(kw_only=True)
class Training:
    """Settings of one training."""

    command: ClassVar[str] = "xformer train encoders"

    steps: int = 4000
    """Training steps."""
    batch_size: int = 128
    """Scenes per step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    width: int = 128
    """Hidden size."""
    layers: int = 4
    """Number of layers."""
    seed: int = 0
    """Random seed."""


@dataclass(kw_only=True)
class ClipConfig(Training):
    """Training of CLIP. `layers` are those of the vision tower, of which X-Former reads the penultimate one."""

    steps: int = 2500
    learning_rate: float = 1e-3
    layers: int = 5


@dataclass(kw_only=True)
class MaeConfig(Training):
    """Training of MAE. The decoder has 3 layers of width 96."""

    mask_ratio: float = 0.5
    """Fraction of masked patches."""
    norm_pix_loss: bool = False
    """Normalise the target pixels of each patch."""


Drawn = Literal["scenes", "photographs"]
"""Data that are drawn: without an end, and with models of their own."""


@dataclass(kw_only=True)
class LmConfig(Training):
    """Train the tiny language model on descriptions of scenes, each followed by questions and a caption."""

    command: ClassVar[str] = "xformer train lm"

    data: Drawn = "scenes"
    """Scenes whose descriptions it reads: the embedded ones, or photographs (docs/data.md)."""
    output: Path = Path("weights")
    """Folder in which opt/ is written."""
    batch_size: int = 32
    questions_per_scene: int = 8
    """Questions after each description."""


@dataclass
class EncodersConfig:
    """Train the tiny CLIP and MAE in two parallel one-thread processes, and write the Q-Former's tokenizer."""

    output: Path = Path("weights")
    """Folder in which clip/, mae/ and qformer_tokenizer/ are written; for `xformer train stage1 --encoders`."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Training of CLIP."""
    mae: MaeConfig = field(default_factory=MaeConfig)
    """Training of MAE."""
    data: Drawn = "scenes"
    """Scenes to train on: the embedded ones, or photographs (docs/data.md)."""


@dataclass
class ProbeConfig:
    """Probe frozen encoders, or a trained model: which attributes of scenes can be read from their tokens."""

    model: Path | None = None
    """Folder of a trained model, or of its run: probe its C, M, M', Z_q, Z' and soft prompt. Default: the encoders."""
    data: Drawn = "scenes"
    """Scenes to probe with: the embedded ones, or photographs (docs/data.md)."""
    attributes: tuple[str, ...] = ()
    """Types of questions to probe for. Default: texture, count_texture, ground, size, colour and count of scenes; all of
    photographs."""
    encoders: Path = Path(__file__).parent / "weights"
    """Folder with the encoders clip/ and mae/. Default: the shipped ones."""
    train: int = 8000
    """Number of training scenes."""
    validation: int = 2000
    """Number of validation scenes, on which the best epoch is chosen."""
    test: int = 4000
    """Number of test scenes, on which accuracy is reported."""
    epochs: int = 40
    """Training epochs per probe."""
    batch_size: int = 256
    """Questions per step."""
    learning_rate: float = 5e-3
    """Peak learning rate of the one-cycle schedule."""
    width: int = 128
    """Hidden size of a probe."""
    seed: int = 0
    """Seed of the untrained network, the probes' initial weights and the order of the questions."""


ExportName = Literal[
    "vqav2",
    "ok-vqa",
    "gqa",
    "coco-captions",
    "nocaps",
    "gvt-counting",
    "gvt-identification",
    "coco-retrieval",
    "flickr-retrieval",
]


@dataclass(frozen=True, kw_only=True)
class SceneExportConfig:
    """Write the embedded scenes in a benchmark's official files, to try the benchmark without its data."""

    name: Annotated[ExportName, tyro.conf.Positional]
    """The benchmark; easy-vqa, scenes and photographs need no files."""
    output_dir: Path
    """A new or empty folder; written atomically."""
    size: int = 200
    """Number of scenes in each list of the benchmark."""
    seed: int = 0
    """Seed of the scenes."""
    split: Literal["validation", "test"] = "test"
    """Split of the held-out scenes."""

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid size."""
        if self.size < 1:
            raise ValueError(f"--size must be at least 1, not {self.size}")
