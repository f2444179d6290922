"""The command: read a recipe, compute the cost on each GPU, print and return the result."""

import json
from bisect import bisect_right
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, OPTConfig
from transformers.configuration_utils import PreTrainedConfig

from xformer_mllm.checkpoints import model_folder
from xformer_mllm.commands import EstimateConfig
from xformer_mllm.estimate.costs import GPUS, Work, costs, memory, step_seconds, tokens_of, total
from xformer_mllm.estimate.sizes import Sizes, empty_model, sizes_of
from xformer_mllm.estimate.tables import show
from xformer_mllm.files import read_json
from xformer_mllm.language_models import check_on_hub, language_model_dir
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.variants import VARIANTS, variant_config

MOST_IMAGES = 2**20  # the largest batch considered
OPT_WIDTHS = {"facebook/opt-2.7b": 2560, "facebook/opt-6.7b": 4096}  # both have 32 layers and 32 heads


RECIPE_FIELDS = ("steps", "batch_size", "gradient_accumulation_steps", "max_text_tokens")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the settings of a recipe. Raises FileNotFoundError, or ValueError if some are missing."""
    recipe = read_json(path / "config.json" if path.is_dir() else path)
    if not isinstance(recipe, dict) or recipe.get("command") not in ("train stage1", "train stage2"):
        raise ValueError(f'{path}: not a recipe of `xformer train stage1|stage2` (no such "command")')
    if missing := [name for name in RECIPE_FIELDS if not isinstance(recipe.get(name), int)]:
        raise ValueError(f"{path}: {missing[0]!r} is missing or not an integer; the config.json of a run is complete")
    if recipe["command"] == "train stage2" and not isinstance(recipe.get("llm"), str):
        raise ValueError(f"{path}: 'llm', the name of the language model, is missing")
    return recipe


def work_of(recipe: dict[str, Any], batch_size: int, gpus: int) -> Work:
    """The work of each GPU."""
    tokens = recipe["max_text_tokens"]
    if recipe["command"] == "train stage1":
        return Work(1, batch_size, tokens, gpus)
    if recipe.get("text", "captions") == "captions":
        return Work(2, batch_size, tokens, gpus)
    aware, texts = recipe.get("instruction_aware", True), recipe.get("questions_per_image", 1)
    return Work(2, batch_size, tokens, gpus, texts, 1 + tokens, aware)


def model_config(recipe: dict[str, Any], variant: str | None, model: Path | None) -> XFormerConfig:
    """The paper's configuration or that of a model's folder, with the recipe's variant and, in stage 2, language model.

    Raises OSError or ValueError if a folder or a language model cannot be read.
    """
    base = XFormerConfig.paper() if model is None else _config_of(model)
    config = variant_config(variant or recipe.get("variant") or "xformer", base)
    if recipe["command"] == "train stage2":
        config.text_config = language_model_config(recipe["llm"])
        aware = recipe.get("text") == "questions" and recipe.get("instruction_aware", True)
        config.qformer_config.use_qformer_text_input = config.instruction_aware = aware
    return config


def _config_of(model: Path) -> XFormerConfig:
    """Read the configuration of a model from its folder or its run's. Raises FileNotFoundError without an X-Former."""
    folder = model_folder(model)
    fields = read_json(folder / "config.json")  # in an unfinished run, the run's settings
    if not isinstance(fields, dict) or fields.get("model_type") != XFormerConfig.model_type:
        raise FileNotFoundError(f"{folder}: config.json is not that of an X-Former; is the run finished?")
    return XFormerConfig.from_pretrained(folder)


def language_model_config(name: str) -> PreTrainedConfig:
    """The configuration of a language model; the paper's two need no Hub."""
    if width := OPT_WIDTHS.get(name):
        depth = {"num_hidden_layers": 32, "num_attention_heads": 32}
        return OPTConfig(hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, **depth)
    source = language_model_dir(name)
    if isinstance(source, str):
        check_on_hub("llm", source)
    config = AutoConfig.from_pretrained(source)
    if config.is_encoder_decoder:
        raise ValueError(f"{name}: an encoder-decoder; only causal language models are supported")
    return config


# ---- the command


def estimate(settings: EstimateConfig) -> dict[str, Any]:
    """Run `xformer estimate` and return the result. Raises FileNotFoundError or ValueError for unreadable input."""
    recipe = read_recipe(settings.recipe)
    config = model_config(recipe, settings.variant, settings.model)
    work = work_of(recipe, settings.batch_size or recipe["batch_size"], settings.count)
    result = _run(settings, recipe, config, work)
    if settings.compare:
        result["variants"] = _variants(settings, recipe, work)
    print(json.dumps(result, indent=2) if settings.json else show(result))
    return result


def _run(settings: EstimateConfig, recipe: dict[str, Any], config: XFormerConfig, work: Work) -> dict[str, Any]:
    gpu, sizes = GPUS[settings.gpu], sizes_of(empty_model(config, work.stage))
    parts, tokens = costs(config, sizes, work), tokens_of(config, work.stage)
    passes = recipe["gradient_accumulation_steps"]
    seconds = step_seconds(config, sizes, work, gpu, settings.utilisation, passes)
    held = memory(config, sizes, work)
    needed = round(sum(held.values()) * (1 + settings.reserve))
    images = work.images * work.gpus * passes
    hours = recipe["steps"] * seconds / 3600
    of_image = total(parts.values())
    return {
        "recipe": str(settings.recipe),
        "variant": settings.variant or recipe.get("variant") or "xformer",
        "gpu": {"name": settings.gpu, **asdict(gpu)},
        "assumed": {"utilisation": settings.utilisation, "reserve": settings.reserve},
        "work": asdict(work),
        "parameters": {name: [number, sizes.trained[name]] for name, number in sizes.parameters.items()},
        "per_image": {name: asdict(cost) for name, cost in parts.items()},
        "tokens_per_image": {
            "clip": tokens.clip,
            "second_encoder": tokens.mae,
            "queries": config.num_query_tokens,
            "text": work.text_tokens * work.texts,
        },
        "step": {
            "images": images,
            "flops_per_gpu": passes * work.images * (of_image.forward + of_image.backward),
            "seconds": seconds,
            "images_per_second": images / seconds,
        },
        "run": {
            "steps": recipe["steps"],
            "images": recipe["steps"] * images,
            "epochs": recipe["steps"] * images / (recipe.get("train_size") or settings.epoch),
            "text_tokens": recipe["steps"] * images * work.texts * work.text_tokens,
            "hours": hours,
            "gpu_hours": hours * work.gpus,
        },
        "memory": {
            **held,
            "reserve": needed - sum(held.values()),
            "needed": needed,
            "largest_batch_size": _largest(config, sizes, work, gpu.memory / (1 + settings.reserve)),
        },
    }


def _largest(config: XFormerConfig, sizes: Sizes, work: Work, room: float) -> int:
    """The largest batch that fits; 0 if none does."""
    return bisect_right(
        range(1, MOST_IMAGES), room, key=lambda n: sum(memory(config, sizes, replace(work, images=n)).values())
    )


def _variants(settings: EstimateConfig, recipe: dict[str, Any], work: Work) -> dict[str, Any]:
    """FLOPs per image, seconds per pass, bytes on a GPU and trained parameters of each variant."""
    rows = {}
    for name in VARIANTS:
        config = model_config(recipe, name, settings.model)
        sizes = sizes_of(empty_model(config, work.stage))
        of_image = total(costs(config, sizes, work).values())
        rows[name] = {
            "trained": sum(sizes.trained.values()),
            "flops_per_image": of_image.forward + of_image.backward,
            "seconds": step_seconds(config, sizes, work, GPUS[settings.gpu], settings.utilisation),
            "memory": round(sum(memory(config, sizes, work).values()) * (1 + settings.reserve)),
        }
    return rows
