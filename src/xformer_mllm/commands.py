"""The arguments of the commands: what `xformer COMMAND --help` shows, without the imports that the commands need.

tyro turns each dataclass into flags; the text under a field is its `--help`. Training's are in `train/config.py`, the
embedded world's in `embedded/commands.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

ANSWER_TOKENS = 8
"""Maximum number of tokens of an answer to a visual question, a few words."""


SCENES = ("scenes", "scenes-detailed")
DRAWN = (*SCENES, "photographs")
"""Data that are drawn, as many as are asked for. The captions of `scenes-detailed` leave out less."""
DATA = (*DRAWN, "easy-vqa")
"""The training data that the package draws, or that comes with its extra."""


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


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a model: a web page, and an OpenAI-compatible API under /v1.

    Without MODEL, the three models that ship with the package are served.
    """

    model: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a stage-2 model, or of its run. Default: the shipped X-Former."""
    baseline: Path | None = None
    """Another stage-2 model, which the page asks the same questions. Default with the shipped X-Former: its Q-Former."""
    stage1: Path | None = None
    """Stage-1 model for /v1/embeddings, and for captions and reconstructions on the page. Default with the shipped
    X-Former: its stage 1."""
    examples: Path | None = None
    """Folder of example images for the page. Default with the shipped X-Former: two scenes."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for other machines, which should go with --api-key."""
    port: int = 8000
    """Port to listen on."""
    page: bool = True
    """Whether to serve the web page besides the API."""
    api_key: str | None = None
    """Key that clients must send, and the page's password. Default: XFORMER_API_KEY of the environment, or none."""
    allow_url_host: tuple[str, ...] = ()
    """Hosts from which images are fetched by URL. By default clients send images as data URLs only."""
    max_batch: int = 16
    """Maximum number of answers that are generated together."""
    max_waiting: int = 64
    """Maximum number of waiting requests; more are refused with status 429."""
    max_tokens: int = 256
    """Maximum number of tokens of an answer."""
    max_pixels: int = 32_000_000
    """Maximum number of pixels of an image."""
    max_body: int = 20_000_000
    """Maximum number of bytes of a request."""
    seconds: float = 60
    """Maximum duration of a request."""

    def __post_init__(self) -> None:
        """Raises ValueError for invalid settings."""
        for name in ("max_batch", "max_waiting", "max_tokens", "max_pixels", "max_body", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{flag_of(name)} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port must be between 0 and 65535, not {self.port}")


# ----------------------------------------------------------------------------------------------------------- evaluate


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The benchmark and its files."""

    benchmark: str = "scenes"
    """scenes, photographs, easy-vqa, vqav2, ok-vqa, gqa, coco-captions, nocaps, gvt-counting, gvt-identification,
    coco-retrieval or flickr-retrieval."""
    data: Path | None = None
    """Folder of the benchmark's files in their official names (docs/evaluation.md); the first three need none."""
    images: Path | None = None
    """Folder of its images. Default: the official place in --data."""
    split: str | None = None
    """Split of the benchmark. Default: the one that the paper reports; test for scenes, photographs and easy-vqa."""
    size: int = 2_000
    """Number of scenes (scenes and photographs only)."""
    questions_per_image: int = 4
    """Number of questions about each scene (scenes and photographs only)."""
    seed: int = 0
    """Seed of the scenes (scenes and photographs only)."""


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
    workers: int | None = None
    """Processes that load images. Default: 4 for each GPU, 0 on a CPU."""
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
    data: Literal["scenes", "photographs", "easy-vqa"] = "scenes"
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
    space: bool = False
    """Write a Gradio Space instead: the page of `xformer serve` with the model, ready to push."""
    baseline: Path | None = None
    """With --space: another stage-2 model, which the page asks the same questions."""
    stage1: Path | None = None
    """With --space: stage-1 model for captions and reconstructions on the page."""
    examples: Path | None = None
    """With --space: folder of example images."""
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
        for name in ("baseline", "stage1", "examples"):
            if getattr(self, name) is not None and not self.space:
                raise ValueError(f"{flag_of(name)} requires --space")
        if self.license != "other" and (self.license_name or self.license_link):
            raise ValueError(f"--license-name and --license-link require --license other, not {self.license}")
        for named in self.base_models:
            if not all(named.partition("=")[::2]):
                raise ValueError(f"--base-models {named}: expected NAME=LICENCE")
