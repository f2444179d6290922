"""The arguments of the commands: what `xformer COMMAND --help` shows, without the imports that the commands need.

tyro turns each dataclass into flags; the text under a field is its `--help`. Training's are in `train/config.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

ANSWER_TOKENS = 8
"""Maximum number of tokens of an answer to a visual question, a few words."""


DATA = ("scenes", "scenes-detailed", "easy-vqa")
"""The training data that comes with the package, or with its extra. The captions of `scenes-detailed` leave out less."""


def flag_of(field: str) -> str:
    """Return the flag of a field."""
    return f"--{field.replace('_', '-')}"


# ---------------------------------------------------------------------------------------------------------------- use


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Fields that every command has."""

    model: Path | None = None
    """Folder of a trained model, or of its run. Default: the model that ships with the package."""
    batch_size: int = 32
    """Images, or questions, per batch."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(InferenceConfig):
    """Describe images. A stage-2 model answers with its language model, a stage-1 model with its Q-Former."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Paths, or scene:SPLIT:INDEX for a scene of the embedded world, e.g. scene:test:3."""
    max_new_tokens: int = 30
    """Maximum number of tokens of a caption."""


@dataclass(frozen=True, kw_only=True)
class AskConfig(InferenceConfig):
    """Ask questions about an image."""

    image: Annotated[str, tyro.conf.Positional]
    """A path, or scene:SPLIT:INDEX for a scene of the embedded world, e.g. scene:test:3."""
    questions: Annotated[tuple[str, ...], tyro.conf.Positional]
    """One or more questions, each in quotes."""
    max_new_tokens: int = ANSWER_TOKENS
    """Maximum number of tokens of an answer."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(InferenceConfig):
    """Write a model's features of images to a file: C, M, Z_q, Z', M' of the paper's figure."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Paths, or scene:SPLIT:INDEX for a scene of the embedded world, e.g. scene:test:3."""
    output: Path = Path("features.safetensors")
    """File to write: a tensor per feature, images first; the metadata holds the images' names."""
    attention: bool = False
    """Also write the queries' attention maps: over C for each Q-Former layer, over M' for each fusion block."""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(InferenceConfig):
    """Mask patches of images and write the reconstructions by MAE and by X-Former to a PNG.

    MAE's frozen decoder reconstructs from M, and from M', which has read the queries and through them CLIP's tokens of the
    whole image.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Paths, or scene:SPLIT:INDEX for a scene of the embedded world, e.g. scene:test:3."""
    output: Path = Path("reconstruction.png")
    """File to write: a row per image."""
    mask_ratio: float = 0.5
    """Share of the patches that are masked; 0.5 in training."""
    seed: int = 0
    """Seed of the mask, which is the same for every image."""


# ------------------------------------------------------------------------------------------------- the embedded world


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train X-Former and the Q-Former baseline with equal budgets and compare them on held-out images."""

    data: Literal["scenes", "easy-vqa"] = "scenes"
    """Images and questions: the embedded scenes, or easy-VQA (needs the extra easy-vqa)."""
    llm: str = "opt"
    """Frozen language model: opt (tiny, shipped), smollm2, or the folder or Hub id of a causal language model."""
    variants: tuple[str, ...] = ("qformer", "xformer")
    """Models to train. The first is the baseline of the comparison."""
    seed: int = 0
    """Seed of the initial weights, the batches and the masks."""
    output_dir: Path = Path("runs/demo")
    """Folder for the runs, the scores and the report."""
    stage1_steps: int = 720
    """Training steps of stage 1, per variant."""
    stage2_steps: int | None = None
    """Training steps of stage 2, per variant. Default: 800 with opt, 250 with another language model."""
    train_size: int = 24_000
    """Maximum number of training images."""
    test_size: int = 2_000
    """Number of held-out scenes to ask about. easy-VQA always uses all its test questions."""
    zero_shot: bool = False
    """Also run stage 2 on captions only and ask the questions zero-shot, as in the paper."""

    def __post_init__(self) -> None:
        """Raises ValueError for invalid settings."""
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError("--variants needs one or more different names")
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


@dataclass(kw_only=True)
class LmConfig(Training):
    """Train the tiny language model on descriptions of scenes, each followed by questions and a caption."""

    command: ClassVar[str] = "xformer train lm"

    output: Path = Path("weights")
    """Folder in which opt/ is written."""
    batch_size: int = 32
    questions_per_scene: int = 8
    """Questions after each description."""


@dataclass
class EncodersConfig:
    """Train the tiny CLIP and MAE in two parallel one-thread processes, and write the Q-Former's tokenizer."""

    output: Path = Path("weights")
    """Folder in which clip/, mae/ and qformer_tokenizer/ are written."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Training of CLIP."""
    mae: MaeConfig = field(default_factory=MaeConfig)
    """Training of MAE."""


@dataclass
class ProbeConfig:
    """Probe frozen encoders, or a trained model: which attributes of scenes can be read from their tokens."""

    model: Path | None = None
    """Folder of a trained model, or of its run: probe its C, M, M', Z_q, Z' and soft prompt. Default: the encoders."""
    attributes: tuple[str, ...] = ("texture", "count_texture", "ground", "size", "colour", "count")
    """Types of questions to probe for."""
    weights: Path = Path(__file__).parent / "embedded" / "weights"
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
    """The benchmark; easy-vqa and scenes need no files."""
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


# ----------------------------------------------------------------------------------------------------------- evaluate


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The benchmark and its files."""

    benchmark: str = "scenes"
    """scenes, easy-vqa, vqav2, ok-vqa, gqa, coco-captions, nocaps, gvt-counting, gvt-identification, coco-retrieval or
    flickr-retrieval."""
    data: Path | None = None
    """Folder of the benchmark's files in their official names (docs/evaluation.md); scenes and easy-vqa need none."""
    images: Path | None = None
    """Folder of its images. Default: the official place in --data."""
    split: str | None = None
    """Split of the benchmark. Default: the one that the paper reports; test for scenes and easy-vqa."""
    size: int = 2_000
    """Number of scenes (scenes only)."""
    questions_per_image: int = 4
    """Number of questions about each scene (scenes only)."""
    seed: int = 0
    """Seed of the scenes (scenes only)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BenchmarkConfig):
    """Run a model on a benchmark: answers, official results file, scores, report. Rerun the same command to resume."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a stage-2 run or its model; of stage 1 for retrieval."""
    settings: str | None = None
    """Preset of prompt and decoding (docs/evaluation.md): paper, lavis, ... Default: the benchmark's first."""
    prompt: str | None = None
    """Overrides the preset; {question} is replaced."""
    num_beams: int | None = None
    """Overrides the preset; 1 is greedy."""
    length_penalty: float | None = None
    """Overrides the preset."""
    repetition_penalty: float | None = None
    """Overrides the preset."""
    max_new_tokens: int | None = None
    """Overrides the preset."""
    min_new_tokens: int | None = None
    """Overrides the preset."""
    k_test: int = 128
    """Number of ITC's best candidates that ITM re-ranks (retrieval only)."""
    batch_size: int = 32
    """Questions or images per batch."""
    workers: int = 0
    """Processes that load images; use 4 or more with a GPU."""
    output_dir: Path | None = None
    """Folder of the results. Default: evaluation/BENCHMARK-SPLIT in the folder of the run, or of an exported model."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(BenchmarkConfig):
    """Score the answers of any model, in the benchmark's official results format."""

    answers: Annotated[Path, tyro.conf.Positional]
    """Results file."""
    partial: bool = False
    """Allow missing answers and score the others."""
    output: Path | None = None
    """JSON file for the scores. Default: print them only."""


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """Analyse where a model's queries attend and how different they are; several models are compared."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trained models of either stage or of their runs; the others are compared with the first."""
    images: tuple[str, ...] = ()
    """Paths, or scene:SPLIT:INDEX; overrides --data."""
    data: Literal["scenes", "easy-vqa"] = "scenes"
    """Data set of the test images."""
    size: int = 200
    """Number of test images."""
    overlays: int = 4
    """Number of images to draw heat maps for."""
    batch_size: int = 32
    """Images per batch."""
    output_dir: Path = Path("runs/queries")
    """Folder of queries.json, queries.html and overlays/."""


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """FLOPs, memory and time of a training run, from its recipe.

    Counted from the shapes; the time assumes a utilisation of the GPU. Captions count with their maximum length
    (max_text_tokens), so real ones cost less.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """Recipe: a file for `xformer train stage1|stage2 --config`, or the folder of a run."""
    gpu: Literal["A100-40", "A100-80", "H100", "H200", "L40S", "RTX-4090"] = "H100"
    """GPU model."""
    count: int = 8
    """Number of GPUs, each with the recipe's batch_size."""
    utilisation: float = 0.4
    """Assumed fraction of the GPU's peak that the matrix products reach."""
    reserve: float = 0.1
    """Assumed additional fraction of memory for the allocator and the libraries."""
    batch_size: int | None = None
    """Batch size per GPU; overrides the recipe."""
    epoch: int = 14_000_000
    """Images per epoch if the recipe has no train_size. Default: the paper's 14M."""
    variant: str | None = None
    """Variant; overrides the recipe (in stage 2 the variant of its stage-1 model)."""
    model: Path | None = None
    """Folder of a run or a model whose sizes to use. Default: the paper's sizes."""
    compare: bool = False
    """Also compare all variants at the same settings, as ratios to qformer."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        """Raises ValueError for invalid settings."""
        if min(self.count, self.epoch, 1 if self.batch_size is None else self.batch_size) < 1:
            raise ValueError("--count, --epoch and --batch-size must be at least 1")
        if not 0 < self.utilisation <= 1 or self.reserve < 0:
            raise ValueError("--utilisation must be above 0 and at most 1, --reserve not negative")


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show the contents of a data source, its broken samples, and a contact sheet."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder, FILE.json, .jsonl or .csv, shards (a folder of .tar, one, or a pattern) or hf:NAME; see docs/data.md."""
    images: Path | None = None
    """Folder of a list's images, or of a mixture's sources; by default the file's."""
    sheet: Path = Path("contact-sheet.png")
    """File for the contact sheet: 24 random images with their captions, or questions and answers."""
    max_images: int = 1000
    """Maximum images to decode, spread evenly over a list or the starts of ten shards; 0 for all."""

    def __post_init__(self) -> None:
        if self.max_images < 0:
            raise ValueError(f"--max-images must not be negative, but is {self.max_images}")


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Write any data source as webdataset shards, as img2dataset does."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder, FILE.json, .jsonl or .csv, shards (a folder of .tar, one, or a pattern) or hf:NAME; see docs/data.md."""
    output_dir: Path
    """Folder for the shards; rerun the same command to resume."""
    images: Path | None = None
    """Folder of a list's images; by default the file's."""
    split: str | None = None
    """Split of the source to write; by default its only one, or train."""
    samples_per_shard: int = 10_000
    """Samples per shard."""
    shortest_side: int | None = None
    """Resize larger images to this shorter side, in pixels; by default files are copied unchanged."""

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "shortest_side"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{flag_of(name)} must be at least 1, not {getattr(self, name)}")


# ------------------------------------------------------------------------------------------------------------ publish


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Assemble a starting X-Former from published checkpoints: for stage 1, or with --llm for stage 2.

    A source is a Hub id or a local folder of transformers, or a .pth file of LAVIS or of the MAE's authors. The new
    model is compared with its sources, and kept only if they agree.
    """

    qformer: str
    """BLIP-2 (Salesforce/blip2-opt-2.7b, Salesforce/blip2-itm-vit-g), LAVIS's blip2_pretrained*.pth, or a BERT."""
    output_dir: Path
    """Folder for the new model; must be new or empty."""
    mae: str | None = None
    """The MAE with its decoder (facebook/vit-mae-huge, or its authors' mae_visualize_vit_*.pth), or any vision tower for
    a variant without reconstruction."""
    llm: str | None = None
    """The frozen language model (facebook/opt-2.7b, google/flan-t5-xl), to start stage 2; by default the model starts
    stage 1."""
    clip: str | None = None
    """The CLIP tower, if not the Q-Former's own: LAVIS's eva_vit_g.pth, a BLIP-2, or any vision tower."""
    variant: str = "xformer"
    """The model variant, a row of the paper's tables (xformer, qformer, concat, ...; see variants.py)."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the frozen parts; trainable parts are float32."""
    qformer_tokenizer: str | None = None
    """The Q-Former's tokenizer; by default that of --qformer if it is a BERT, otherwise bert-base-uncased."""
    allow: tuple[str, ...] = ()
    """Names (* matches anything) of tensors that may be initialised or left over; for others this is an error."""
    seed: int = 0
    """Seed of the initialised tensors."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a model as a self-contained folder with a model card, for the Hub and for plain transformers."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a model."""
    output_dir: Path
    """Folder to write; must be new or empty."""
    max_shard_size: str = "5GB"
    """Maximum size of a weight file; a larger tensor gets its own file."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the frozen parts; by default unchanged. Trainable parts keep theirs."""
    repo_id: str | None = None
    """The model's name on the Hub (you/xformer-opt-2.7b), for the card; by default the new folder's name."""
    license: str = "other"
    """Licence of the whole model, frozen parts included, by its Hub identifier (apache-2.0, cc-by-nc-4.0, ...)."""
    license_name: str | None = None
    """Name of the licence if --license is other."""
    license_link: str | None = None
    """Link to the licence if --license is other."""
    base_models: tuple[str, ...] = ()
    """The models it contains, each with its licence: facebook/opt-2.7b=other facebook/vit-mae-huge=cc-by-nc-4.0.
    Names are detected from the run's files where possible; licences are not."""
    datasets: tuple[str, ...] = ()
    """Training data sets, by their Hub names."""
    metrics: tuple[Path, ...] = ()
    """Further metrics.json files; those that `xformer evaluate` wrote to the run's folder are found."""

    def __post_init__(self) -> None:
        if self.license != "other" and (self.license_name or self.license_link):
            raise ValueError(f"--license-name and --license-link require --license other, not {self.license}")
        for named in self.base_models:
            if not all(named.partition("=")[::2]):
                raise ValueError(f"--base-models {named}: expected NAME=LICENCE")
