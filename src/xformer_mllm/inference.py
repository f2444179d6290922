"""Using a trained model on images: `xformer caption`, `ask`, `features` and `reconstruct`.

An image is a path, or `scene:SPLIT:INDEX` (e.g. scene:test:3) for a scene of the embedded world. Each command prints
what it found, and returns it; `--json` prints it as JSON for programs.

B images, L MAE patches, P values of a patch, as in model/.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

from xformer_mllm import defaults
from xformer_mllm.checkpoints import load_model, model_folder
from xformer_mllm.data.questions import QUESTION_PROMPT
from xformer_mllm.evaluate.benchmark import most_new_tokens
from xformer_mllm.files import read_json
from xformer_mllm.model.images import load_image
from xformer_mllm.model.modeling_xformer import (
    XFormerForConditionalGeneration,
    XFormerForPreTraining,
    XFormerModelOutput,
)
from xformer_mllm.report.reconstructions import reconstructions, rows_of_panels, sheet

STAGE1 = Path("runs/demo/xformer/stage1/model")
STAGE2 = Path("runs/demo/xformer/stage2/model")
KINDS = (XFormerForPreTraining, XFormerForConditionalGeneration)

BETTER_CAPTIONS = "a stage-1 model, or a stage-2 one that was trained on captions, captions better"

FEATURES = ("clip_tokens", "mae_tokens", "queries", "fused_queries", "enriched_mae_tokens")


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """What every command shares."""

    model: Path = STAGE2
    """Folder of a trained model, or of the run that trained it."""
    batch_size: int = 32
    """Images (or questions) at a time."""
    json: bool = False
    """Print JSON, for programs."""


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(InferenceConfig):
    """Describe images. A stage-2 model answers through its language model, a stage-1 model by its Q-Former alone."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Paths, or scene:SPLIT:INDEX for a scene of the embedded world, e.g. scene:test:3."""
    max_new_tokens: int = 30
    """Longest caption."""


@dataclass(frozen=True, kw_only=True)
class AskConfig(InferenceConfig):
    """Ask questions about an image."""

    image: Annotated[str, tyro.conf.Positional]
    """A path, or scene:SPLIT:INDEX for a scene of the embedded world, e.g. scene:test:3."""
    questions: Annotated[tuple[str, ...], tyro.conf.Positional]
    """One or more, each in quotes."""
    max_new_tokens: int = 8
    """Longest answer."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(InferenceConfig):
    """Write what every part of the model makes of images: C, M, Z_q, Z', M' of the paper's figure."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Paths, or scene:SPLIT:INDEX for a scene of the embedded world, e.g. scene:test:3."""
    output: Path = Path("features.safetensors")
    """One tensor a feature, its first dimension the images; their names are in the file's metadata."""
    attention: bool = False
    """Also the queries' attention maps: over C in each Q-Former layer that reads it, over M' in each fusion block."""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(InferenceConfig):
    """Hide patches of images from the MAE and paint what it and X-Former put there, side by side in a PNG.

    The MAE's own decoder paints both: once from M, once from M', which has read the queries; and they have read CLIP's
    view of the whole image.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Paths, or scene:SPLIT:INDEX for a scene of the embedded world, e.g. scene:test:3."""
    model: Path = STAGE1
    """Folder of a trained model with reconstruction, or of its run; by default stage 1, which trains it."""
    output: Path = Path("reconstruction.png")
    """A row for each image."""
    mask_ratio: float = 0.5
    """Share of the patches that are hidden; 0.5 in training."""
    seed: int = 0
    """Which patches; the same ones in every image."""


# ------------------------------------------------------------------------------------------------------------ commands


@torch.inference_mode()
def caption(config: CaptionConfig) -> list[dict[str, str]]:
    """Run `xformer caption`: [{"image", "caption"}]. Raises ValueError or FileNotFoundError in one line."""
    _check_images(config.images)
    model, processor = load_model(config.model, KINDS)
    if isinstance(model, XFormerForConditionalGeneration) and _learned_answers(config.model):
        print(f"{config.model}: has learned answers; {BETTER_CAPTIONS}", file=sys.stderr)
    found = []
    for names, pixels in _batches(config, config.images, model, processor):
        if isinstance(model, XFormerForPreTraining):
            tokenizer = processor.qformer_tokenizer
            tokens = model.caption(pixels, tokenizer.sep_token_id, max_new_tokens=config.max_new_tokens)
        else:
            tokenizer = processor.tokenizer
            text = processor(text=[""] * len(names)).to(model.device)
            most = most_new_tokens(model, text["attention_mask"], config.max_new_tokens)
            tokens = model.generate(pixels, **text, max_new_tokens=most, do_sample=False)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        found += [{"image": name, "caption": text.strip()} for name, text in zip(names, texts, strict=True)]
    _print_texts(config, found, "image", "caption")
    return found


@torch.inference_mode()
def ask(config: AskConfig) -> list[dict[str, str]]:
    """Run `xformer ask`: [{"image", "question", "answer"}]; prompt and decoding as in `evaluate/scenes.py`."""
    if not any(question.strip() for question in config.questions):
        raise ValueError('ask a question, e.g. xformer ask photo.jpg "What colour is the circle?"')
    for number, question in enumerate(config.questions, 1):
        if not question.strip():
            raise ValueError(f"question {number} of {len(config.questions)} is empty; leave it out")
    model, processor = load_model(config.model, [XFormerForConditionalGeneration])
    ((_, pixels),) = _batches(config, [config.image], model, processor)
    found = []
    for questions in _chunks(config.questions, config.batch_size):
        text = processor(text=[QUESTION_PROMPT.format(question=question.strip()) for question in questions]).to(
            model.device
        )
        tokens = model.generate(
            pixels,
            image_index=torch.zeros(len(questions), dtype=torch.long, device=model.device),
            **text,
            max_new_tokens=most_new_tokens(model, text["attention_mask"], config.max_new_tokens),
            do_sample=False,
        )
        answers = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        found += [
            {"image": config.image, "question": question, "answer": answer.strip()}
            for question, answer in zip(questions, answers, strict=True)
        ]
    _print_texts(config, found, "question", "answer")
    return found


@torch.inference_mode()
def features(config: FeaturesConfig) -> dict[str, Any]:
    """Run `xformer features`: {"file", "images", "shapes": {feature: shape}}; the tensors are in the file."""
    _check_images(config.images)
    _check_output(config.output, "features.safetensors")
    attention = "eager" if config.attention else None  # no other implementation keeps the maps
    model, processor = load_model(config.model, KINDS, attention)
    batches = [
        _tensors(model.xformer(pixels, output_attentions=config.attention))
        for _, pixels in _batches(config, config.images, model, processor)
    ]
    tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    partial = _partial(config.output)
    save_file(tensors, partial, metadata={"images": json.dumps(config.images), "model": str(config.model)})
    os.replace(partial, config.output)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    found = {"file": str(config.output), "images": list(config.images), "shapes": shapes}
    lines = [f"  {name:22}{shape}" for name, shape in shapes.items()]
    print(json.dumps(found) if config.json else "\n".join([str(config.output), *lines]))
    return found


@torch.inference_mode()
def reconstruct(config: ReconstructConfig) -> list[dict[str, Any]]:
    """Run `xformer reconstruct`: [{"image", "file", "mae_error", "xformer_error"}].

    The errors are mean squared errors over the hidden pixels, which lie in [0, 1].
    """
    _check_images(config.images)
    if not 0 < config.mask_ratio < 1:
        raise ValueError(f"mask_ratio is {config.mask_ratio}; it must be above 0 and below 1")
    _check_output(config.output, "reconstruction.png")
    model, processor = load_model(config.model, KINDS)
    if model.xformer.mae_decoder is None:
        raise ValueError(
            f"{config.model}: this variant has no reconstruction; `xformer train stage1 --variant xformer` has"
        )
    found: list[dict[str, Any]] = []
    rows: list[dict[str, Image.Image]] = []
    for names, pixels in _batches(config, config.images, model, processor):
        images = reconstructions(model, pixels, config.mask_ratio, config.seed)
        hidden = images.pop("hidden")
        errors = {
            key: ((images[label] - images["original"]).square() * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3))
            for key, label in (("mae_error", "MAE"), ("xformer_error", "X-Former"))
        }
        rows += rows_of_panels(images)
        for place, name in enumerate(names):
            measured = {key: error[place].item() for key, error in errors.items()}
            found.append({"image": name, "file": str(config.output), **measured})
    partial = _partial(config.output)
    sheet(rows).save(partial, format="PNG")
    os.replace(partial, config.output)
    if config.json:
        print(json.dumps(found))
    else:
        print(f"{config.output}; mean squared error over the hidden pixels:")
        for row in found:
            print(f"  {row['image']}: MAE {row['mae_error']:.4f}, X-Former {row['xformer_error']:.4f}")
    return found


# ------------------------------------------------------------------------------------------------- models and images


def _check_images(images: Sequence[str]) -> None:
    if not images:
        raise ValueError("name at least one image: a path, or scene:test:0 for a scene of the embedded world")


def _check_output(path: Path, name: str) -> None:
    """Raises ValueError for a folder, before the work is done. name: of a file in it, for example."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file, e.g. --output {path / name}")


def _learned_answers(model: Path) -> bool:
    """Whether its run says so; of a model without its run nobody knows."""
    folder = model_folder(model).absolute()
    run = folder.parent / "config.json"
    return folder.name == "model" and run.is_file() and read_json(run).get("text") == "questions"


def open_image(name: str) -> Image.Image:
    """A path or scene:SPLIT:INDEX -> RGB. Raises ValueError or FileNotFoundError, in one line, if there is none."""
    return defaults.scene(name) if name.startswith("scene:") else load_image(name)


def _batches(
    config: InferenceConfig, images: Sequence[str], model: Any, processor: Any
) -> Iterator[tuple[Sequence[str], torch.Tensor]]:
    """Names and pixels uint8[B, 3, S, S] of `batch_size` images at a time."""
    for names in _chunks(images, config.batch_size):
        pixels = processor(images=[open_image(name) for name in names])["pixel_values"]
        yield names, pixels.to(model.device)


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, not {size}")
    return (items[start : start + size] for start in range(0, len(items), size))


# ------------------------------------------------------------------------------------------------------------- results


def _print_texts(config: InferenceConfig, found: list[dict[str, str]], key: str, value: str) -> None:
    """One text alone, several each behind what it belongs to."""
    if config.json:
        print(json.dumps(found, ensure_ascii=False))
    elif len(found) == 1:
        print(found[0][value])
    else:
        print("\n".join(f"{row[key]}: {row[value]}" for row in found))


def _tensors(output: XFormerModelOutput) -> dict[str, torch.Tensor]:
    """What is to be written of a model's output: the features that the variant has, and attention maps by number."""
    tensors = {name: output[name] for name in FEATURES if output.get(name) is not None}
    for name in ("clip_attentions", "mae_attentions"):
        for number, attention in enumerate(output.get(name) or ()):
            tensors[f"{name}.{number}"] = attention
    # clone: in a variant without fusion Z' is Z_q itself, and a safetensors file takes no tensor twice.
    return {name: tensor.float().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _partial(path: Path) -> Path:
    """Where a file is written until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".partial")
