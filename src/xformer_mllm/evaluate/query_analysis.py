"""Attention maps and diversity of the queries: `xformer queries` (the paper's query analysis).

A query's attention map over an image is its cross-attention, averaged over heads and over the layers that read the
image, without the class token, normalised to sum to 1 over the patches:

    over CLIP tokens   C, in every layer of the Q-Former that reads it
    over MAE tokens    M', in every block of X-Former's dual cross-attention (`concat`: M, next to C)

Scores of one image, from the mean cosine over all pairs of different queries (`DEFINITIONS`):

    attention diversity   1 - mean cosine of the maps
    output similarity     mean cosine of the output queries Z'

A model's score is the mean over images, with a 95 % percentile bootstrap interval over images. Two models are compared
image by image. Instruction-aware models read no text.

`I` images, `Q` queries, `N` CLIP tokens, `P` patches, `D` Q-Former width.
"""

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import normalize

from xformer_mllm import defaults
from xformer_mllm.checkpoints import load_model
from xformer_mllm.commands import QueriesConfig
from xformer_mllm.files import atomic_path, write_whole
from xformer_mllm.inference import KINDS, open_image
from xformer_mllm.report.queries import QueryAnalysis, query_page, verdict
from xformer_mllm.report.wording import display_name

DIVERSITY = "attention diversity over {tokens} tokens"
SIMILARITY = "output similarity"
DEFINITIONS = {
    DIVERSITY: (
        "1 − mean cosine of the attention maps of two queries over the {tokens} tokens (averaged over heads and layers, "
        "class token left out). 0: all queries attend to the same patches; 1: no two queries share a patch."
    ),
    SIMILARITY: "Mean cosine of two output queries Z'. 1: all queries are equal.",
}

RESAMPLES = 2_000
MIN_IMAGES = 10  # for an interval; with fewer it would be too narrow
TILES = 8  # queries shown of each model
TILE_PIXELS = 104
# Heat, from lowest to highest: light yellow, orange, dark red. It only gets darker, so it is readable without colour.
HEAT = ((255, 255, 204), (254, 217, 118), (253, 141, 60), (227, 26, 28), (110, 0, 34))
TOP_QUANTILE = 0.99  # of the patches shown, where the scale ends

WHITE = Image.new("RGB", (TILE_PIXELS, TILE_PIXELS), "white")


@dataclass(frozen=True)
class Queries:
    """A model's queries on I images. maps: {"CLIP": [I, Q, S, S], "MAE": ...}, of sum 1; outputs: Z', [I, Q, D]."""

    maps: Mapping[str, torch.Tensor]
    outputs: torch.Tensor

    def scores(self) -> dict[str, torch.Tensor]:
        """{metric: fp32[I]}."""
        diversity = {
            DIVERSITY.format(tokens=tokens): 1 - mean_pairwise_cosine(maps.flatten(2))
            for tokens, maps in self.maps.items()
        }
        return {**diversity, SIMILARITY: mean_pairwise_cosine(self.outputs)}


# ------------------------------------------------------------------------------------------------------------- command


def queries(config: QueriesConfig) -> dict[str, Any]:
    """Run `xformer queries` and return the content of queries.json. Raises ValueError or FileNotFoundError."""
    began = time.time()
    names = model_names(config.models)
    analysis = analyse(
        dict(zip(names, config.models, strict=True)), images_of(config), config.batch_size, config.overlays
    )
    folder = config.output_dir
    files = {}
    for number, (name, sheet) in enumerate(analysis.overlays):
        files[name] = f"overlays/{number}.png"
        with atomic_path(folder / files[name]) as partial:
            sheet.save(partial, format="PNG")
    provenance = {
        "Models": ", ".join(map(str, config.models)),
        "Images": f"{analysis.image_count:,}, {'as named' if config.images else f'of the test split of {config.data}'}",
        "Versions": f"xformer-mllm {version('xformer-mllm')}, torch {version('torch')}, Python {platform.python_version()}",
        "Finished": time.strftime("%Y-%m-%d %H:%M %Z"),
        "Wall time": f"{time.time() - began:.1f} s",
    }
    found = {
        "models": analysis.models,
        "differences": analysis.differences,
        "definitions": analysis.definitions,
        "images": analysis.image_count,
        "overlays": files,
    }
    write_whole(folder / "queries.html", query_page(analysis, provenance))
    write_whole(folder / "queries.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print("\n".join(sentence.replace("\u00a0", " ") for sentence in verdict(analysis)))
    print(folder / "queries.html")
    return found


def images_of(config: QueriesConfig) -> dict[str, Image.Image]:
    """Name -> image, the named ones or those of a test split."""
    if config.images:
        return {name: open_image(name) for name in config.images}
    if config.size < 1:
        raise ValueError(f"--size must be at least 1, not {config.size}")
    return defaults.test_images(config.data, config.size)


def model_names(folders: Sequence[Path]) -> list[str]:
    """Name folders by where their paths differ: runs/demo/{qformer,xformer}/stage1 -> qformer, xformer.

    Raises ValueError for a repeated folder, or without any.
    """
    if not folders:
        raise ValueError("name the folder of a trained model, or of its run; several are compared with the first")
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError("the same model is named twice")
    start, end = _shared(parts), _shared([part[::-1] for part in parts])
    names = ["/".join(part[start : len(part) - end]) for part in parts]
    return names if all(names) else list(map(str, folders))


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """Number of leading parts that all paths share."""
    return len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))))


# ------------------------------------------------------------------------------------------------------------ analysis


def analyse(
    models: Mapping[str, Path], images: Mapping[str, Image.Image], batch_size: int = 32, overlays: int = 4
) -> QueryAnalysis:
    """Analyse the queries of trained models over the same images.

    Args:
        models: {name: folder of a model of either stage, or of its run}; the others are compared with the first.
        images: {name: image}.
        batch_size: images per batch.
        overlays: number of images to draw heat maps for.

    Raises:
        ValueError, FileNotFoundError: if a folder holds no such model.
    """
    maps, scores, described = {}, {}, {}
    for name, folder in models.items():
        model, processor = load_model(folder, KINDS, attention="eager")  # other implementations do not return the maps
        found = read_queries(model, processor, list(images.values()), batch_size)
        maps[name], scores[name] = found.maps, found.scores()
        described[name] = {
            "folder": str(folder),
            "stage": "stage 1" if isinstance(model, KINDS[0]) else "stage 2",
            "queries": found.outputs.shape[1],
            "scores": {metric: _mean(values) for metric, values in scores[name].items()},
        }
    first, *others = scores
    tokens = dict.fromkeys(tokens for of_model in maps.values() for tokens in of_model)
    diversity = {DIVERSITY.format(tokens=name): DEFINITIONS[DIVERSITY].format(tokens=name) for name in tokens}
    return QueryAnalysis(
        models=described,
        differences={other: _differences(scores[first], scores[other]) for other in others},
        definitions={**diversity, SIMILARITY: DEFINITIONS[SIMILARITY]},
        image_count=len(images),
        overlays=[
            (name, overlay(image, maps, index)) for index, (name, image) in enumerate(list(images.items())[:overlays])
        ],
    )


@torch.inference_mode()
def read_queries(model: Any, processor: Any, images: Sequence[Image.Image], batch_size: int) -> Queries:
    """Run a model with eager attention on images, without text."""
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {batch_size}")
    if model.config.num_query_tokens < 2:
        raise ValueError("the model has a single query; comparing queries needs two or more")
    found: dict[str, list[torch.Tensor]] = {}
    outputs = []
    for start in range(0, len(images), batch_size):
        pixels = processor(images=list(images[start : start + batch_size]))["pixel_values"]
        output = model.xformer(pixels.to(model.device), output_attentions=True)
        outputs.append(output.fused_queries.float().cpu())
        for tokens, attention in attention_of(output, second_tokens(model.config)).items():
            found.setdefault(tokens, []).append(to_maps(attention).cpu())
    return Queries({tokens: torch.cat(maps) for tokens, maps in found.items()}, torch.cat(outputs))


def second_tokens(config: Any) -> str:
    """Name of the second encoder's tokens."""
    if config.clip_shallow_layer is not None:
        return f"CLIP layer {config.clip_shallow_layer}"
    kind = None if config.mae_config is None else config.mae_config.model_type
    return "MAE" if kind == "vit_mae" else str(kind)


def attention_of(output: Any, second: str) -> dict[str, torch.Tensor]:
    """{tokens: [B, Q, tokens]}, averaged over heads and over layers or blocks."""
    over_clip = torch.stack(output.clip_attentions).float().mean((0, 2))
    tokens = output.clip_tokens.shape[1]
    attention = {"CLIP": over_clip[..., :tokens]}
    if over_clip.shape[-1] > tokens:  # concat: M follows C
        attention[second] = over_clip[..., tokens:]
    if output.mae_attentions:
        attention[second] = torch.stack(output.mae_attentions).float().mean((0, 2))
    return attention


def to_maps(attention: torch.Tensor) -> torch.Tensor:
    """[B, Q, tokens], possibly with a class token first -> [B, Q, S, S] over the patches, of sum 1."""
    side = math.isqrt(attention.shape[-1])
    maps = attention[..., attention.shape[-1] - side * side :].unflatten(-1, (side, side))
    return maps / maps.sum((-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def mean_pairwise_cosine(vectors: torch.Tensor) -> torch.Tensor:
    """[I, Q, D] -> fp32[I]: mean over all pairs of different queries."""
    # The sum of the whole matrix of cosines; its diagonal sums to Q.
    total = normalize(vectors.float(), dim=-1).sum(1).square().sum(-1)
    count = vectors.shape[1]
    return (total - count) / (count * (count - 1))


def _mean(values: torch.Tensor) -> dict[str, Any]:
    return {"mean": values.mean().item(), "ci95": interval(values)}


def _differences(first: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """`other` minus `first`, for their common metrics. "clear": the interval excludes 0."""
    found = {}
    for metric in [metric for metric in other if metric in first]:
        values = other[metric] - first[metric]
        ends = interval(values)
        clear = ends is not None and not ends[0] <= 0 <= ends[1]
        found[metric] = {"difference": values.mean().item(), "ci95": ends, "clear": clear}
    return found


def interval(values: torch.Tensor, seed: int = 0) -> list[float] | None:
    """95 % percentile bootstrap of the mean of [I]; None for fewer than MIN_IMAGES."""
    if len(values) < MIN_IMAGES:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    return np.percentile(values.double().numpy()[drawn].mean(1), [2.5, 97.5]).tolist()


# ------------------------------------------------------------------------------------------------------------ overlays


def most_different(maps: torch.Tensor, number: int) -> list[int]:
    """Choose the `number` of queries of [Q, S, S] that differ most.

    Greedy: first the query least similar to all, then always the one whose most similar chosen query is least similar.
    """
    directions = normalize(maps.flatten(1), dim=-1)
    cosine = directions @ directions.t()
    chosen = [int(cosine.mean(1).argmin())]
    while len(chosen) < min(number, len(maps)):
        nearest = cosine[:, chosen].amax(1)
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
    return chosen


def overlay(image: Image.Image, models: Mapping[str, Mapping[str, torch.Tensor]], index: int) -> Image.Image:
    """Draw the image above a row of heat maps per model and kind of tokens, all on one scale.

    models: {model: {tokens: [I, Q, S, S]}}; index: of the image in I.
    """
    rows = []
    for model, kinds in models.items():
        for tokens, maps in kinds.items():
            heat = maps[index] * maps[index][0].numel()  # 1 if the attention is spread evenly
            chosen = most_different(heat, TILES)
            labels = [f"mean of {len(heat)}", *(f"query {query}" for query in chosen)]
            rows.append((f"{display_name(model)}, over {tokens} tokens", labels, [heat.mean(0), *heat[chosen]]))
    shown = torch.stack([heat for _, _, heats in rows for heat in heats])
    top = max(2.0, float(shown.flatten().quantile(TOP_QUANTILE)))
    resampling = Image.Resampling.NEAREST if max(image.size) < TILE_PIXELS else Image.Resampling.BICUBIC
    return _sheet(image.convert("RGB").resize((TILE_PIXELS, TILE_PIXELS), resampling), rows, top)


def _sheet(image: Image.Image, rows: Sequence[tuple[str, list[str], list[torch.Tensor]]], top: float) -> Image.Image:
    gap, title, small = 8, ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    step, row_height = TILE_PIXELS + gap, TILE_PIXELS + 48
    columns = max(len(tiles) for _, _, tiles in rows)
    sheet = Image.new("RGB", (gap + columns * step, 2 * gap + TILE_PIXELS + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    sheet.paste(image, (gap, gap))
    _scale(sheet, draw, gap + step, gap, top, small)
    note = f"The mean of all queries, then the {columns - 1} that differ most (each from the ones before)."
    draw.text((gap + step, gap + 66), note, fill="#555555", font=small)
    for number, (label, names, heats) in enumerate(rows):
        y = 2 * gap + TILE_PIXELS + number * row_height
        draw.text((gap, y), label, fill="black", font=title)
        for column, (name, heat) in enumerate(zip(names, heats, strict=True)):
            x = gap + column * step
            sheet.paste(_heated(image, heat, top), (x, y + 22))
            draw.text((x, y + 24 + TILE_PIXELS), name, fill="#555555", font=small)
    return sheet


def _scale(sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, top: float, font: Any) -> None:
    """Draw the colour bar with its labels."""
    width, height = 260, 14
    ramp = Image.fromarray(_colours(np.linspace(0, 1, width))[None].repeat(height, 0))
    draw.text((x, y), "Attention of a patch, as a multiple of uniform attention", fill="black", font=font)
    sheet.paste(ramp, (x, y + 20))
    for value, label in ((0.0, "0"), (1.0, "1"), (top, f"{top:.2g} or more")):
        at = x + value / top * (width - 1)
        draw.line((at, y + 20, at, y + 38), fill="black")
        draw.text((at + 3, y + 36), label, fill="black", font=font)


def _heated(image: Image.Image, heat: torch.Tensor, top: float) -> Image.Image:
    """Blend the pale image with the heat, [S, S], interpolated between the centres of patches."""
    share = Image.fromarray((heat / top).numpy().astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    values = np.asarray(share).clip(0, 1)
    pale = Image.blend(Image.blend(image, image.convert("L").convert("RGB"), 0.4), WHITE, 0.4)
    weight = 0.85 * np.sqrt(values)[..., None]  # keep low heat visible
    mixed = np.asarray(pale) * (1 - weight) + _colours(values) * weight
    return Image.fromarray(mixed.round().astype(np.uint8))


def _colours(values: np.ndarray) -> np.ndarray:
    """[...] in [0, 1] -> uint8[..., 3]."""
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values, stops, [colour[channel] for colour in HEAT]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
