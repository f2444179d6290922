"""Train tiny models on an embedded world: CLIP, MAE (with its decoder) and OPT, and two tokenizers.

Those of the scenes ship with the package. Each training sees every training scene once, in order, so nothing can be
memorised. All models are transformers' classes; `recipe.json`, saved with the weights, holds the settings and the
validation metrics.

Legend: B batch, H height, W width, T text tokens.
"""

import json
import math
import platform
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from xformer_mllm.data.questions import CAPTION_PROMPT, QUESTION_PROMPT
from xformer_mllm.embedded.commands import ClipConfig, EncodersConfig, LmConfig, MaeConfig, Training
from xformer_mllm.embedded.photographs import WORLDS
from xformer_mllm.embedded.scenes import ALT_TEXT, SCENES, World
from xformer_mllm.embedded.tokenizers import lm_tokenizer, qformer_tokenizer
from xformer_mllm.files import atomic_path
from xformer_mllm.model.configuration_xformer import IMAGENET_MEAN, IMAGENET_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from xformer_mllm.model.vision_encoders import scaled


def train_encoders(config: EncodersConfig) -> dict[str, dict[str, float]]:
    """Train and write clip/, mae/ and qformer_tokenizer/ under `config.output`; return their validation metrics."""
    save_qformer_tokenizer(config.output, config.data)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        clip = pool.submit(train_clip, config.clip, config.output, config.data)
        mae = pool.submit(train_mae, config.mae, config.output, config.data)
        return {"clip": clip.result(), "mae": mae.result()}


def save_qformer_tokenizer(output: Path, data: str = "scenes") -> None:
    """Write qformer_tokenizer/ under `output`."""
    tokenizer = qformer_tokenizer(WORLDS[data])
    data = f"words of the {data}' texts and of easy-VQA"
    recipe = {"command": "xformer train encoders", "vocabulary": len(tokenizer), "data": data}
    _write(tokenizer.save_pretrained, output / "qformer_tokenizer", recipe)


def new_clip(config: ClipConfig, tokenizer: PreTrainedTokenizerFast, world: World = SCENES) -> CLIPModel:
    """An untrained CLIP; its text tower (2 layers) is discarded after training."""
    common = {"hidden_size": config.width, "intermediate_size": 4 * config.width, "num_attention_heads": 4}
    sizes = {"image_size": world.image_size, "patch_size": world.patch_size}
    vision = {**common, **sizes, "num_hidden_layers": config.layers}
    text = {
        **common,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,  # CLIP pools the text at [SEP]
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(config.seed)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def train_clip(config: ClipConfig, output: Path, data: str = "scenes") -> dict[str, float]:
    """Contrastive training on scenes and captions; write clip/ and return its retrieval metrics on validation."""
    world = WORLDS[data]
    tokenizer = qformer_tokenizer(world)
    model = new_clip(config, tokenizer, world)

    def loss(step: int) -> Tensor:
        scenes = _scenes(world, "train", step * config.batch_size, config.batch_size)
        logits = _clip_logits(model, tokenizer, scenes, world)
        target = torch.arange(len(logits))
        return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2

    recipe = _train(model, loss, config, "clip", lambda: clip_retrieval(model, tokenizer, world))
    recipe["data"] = f"{data} and captions, train split, each seen once"
    recipe["pixels"] = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "scale": 1 / 255}
    _write(model.vision_model.save_pretrained, output / "clip", recipe)
    return recipe["metrics"]


def _clip_logits(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, scenes: list[Any], world: World) -> Tensor:
    """Similarities images x captions, float[B, B]; the learned scale is at most 50."""
    text = tokenizer([world.caption(scene, ALT_TEXT) for scene in scenes], padding=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(
            pixel_values=normalised(_images(world, scenes), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
        )
    scale = model.logit_scale.exp().clamp(max=50)
    return scale * outputs.image_embeds.float() @ outputs.text_embeds.float().T


@torch.no_grad()
def clip_retrieval(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, world: World = SCENES) -> dict[str, float]:
    """Recall at 1 among 100 validation scenes, both directions, mean of 10 rounds (equal captions count as misses)."""
    model.eval()
    text, image = [], []
    for first in range(0, 1000, 100):
        logits = _clip_logits(model, tokenizer, _scenes(world, "validation", first, 100), world)
        target = torch.arange(100)
        text.append((logits.argmax(1) == target).float().mean().item())
        image.append((logits.argmax(0) == target).float().mean().item())
    return {"image_to_text_r1_of_100": float(np.mean(text)), "text_to_image_r1_of_100": float(np.mean(image))}


def new_mae(config: MaeConfig, world: World = SCENES) -> ViTMAEForPreTraining:
    """An untrained MAE with sine-cosine positions (transformers leaves the decoder's at zero)."""
    torch.manual_seed(config.seed)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            image_size=world.image_size,
            patch_size=world.patch_size,
            decoder_hidden_size=96,
            decoder_intermediate_size=384,
            decoder_num_hidden_layers=3,
            decoder_num_attention_heads=4,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix_loss,
            layer_norm_eps=1e-6,
        )
    )
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(model.vit.embeddings.patch_embeddings.num_patches)
    return model


def train_mae(config: MaeConfig, output: Path, data: str = "scenes") -> dict[str, float]:
    """Masked autoencoding of scenes; write mae/ (encoder and decoder) and return its loss on validation."""
    world = WORLDS[data]
    model = new_mae(config, world)
    patches = model.vit.embeddings.patch_embeddings.num_patches
    generator = torch.Generator().manual_seed(config.seed)

    def loss(step: int) -> Tensor:
        scenes = _scenes(world, "train", step * config.batch_size, config.batch_size)
        noise = torch.rand(len(scenes), patches, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            return model(normalised(_images(world, scenes), IMAGENET_MEAN, IMAGENET_STD), noise=noise).loss

    recipe = _train(model, loss, config, "mae", lambda: mae_loss(model, world))
    recipe["data"] = f"{data}, train split, each seen once"
    recipe["pixels"] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "scale": 1 / 255}
    _write(model.save_pretrained, output / "mae", recipe)
    return recipe["metrics"]


@torch.no_grad()
def mae_loss(model: ViTMAEForPreTraining, world: World = SCENES) -> dict[str, float]:
    """Reconstruction loss on 512 validation scenes with fixed masks, and their variance (the mean image's loss)."""
    model.eval()
    images = normalised(_images(world, _scenes(world, "validation", 0, 512)), IMAGENET_MEAN, IMAGENET_STD)
    patches = model.vit.embeddings.patch_embeddings.num_patches
    noise = torch.rand(512, patches, generator=torch.Generator().manual_seed(0))
    return {
        "reconstruction_loss": model(images, noise=noise).loss.item(),
        "variance": images.var(dim=(0, 2, 3)).mean().item(),
    }


def new_lm(config: LmConfig, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """An untrained OPT of the configured size; generation stops at the tokenizer's end token."""
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(config.seed)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            word_embed_proj_dim=config.width,
            ffn_dim=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            dropout=0.0,
            **tokens,
        )
    )
    model.generation_config = GenerationConfig(**tokens)
    return model


def train_lm(config: LmConfig) -> dict[str, float]:
    """Train on captions and answers after descriptions; write opt/ and return its accuracy on validation.

    A sequence is a description, segments "</s> Question: ... Answer: ... <end>" and one "</s> caption <end>". A segment
    attends to the description and itself, and its positions start after the description: the model learns
    [description][</s> text <end>], the layout of stage 2, where soft prompts replace the description. The loss is on
    captions and answers only: descriptions and questions are random, with little to learn.
    """
    world = WORLDS[config.data]
    tokenizer = lm_tokenizer(world)
    model = new_lm(config, tokenizer)

    def loss(step: int) -> Tensor:
        first = step * config.batch_size
        batch = pack([scene_text(i, config, tokenizer) for i in range(first, first + config.batch_size)], tokenizer)
        targets = batch.pop("targets")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    recipe = _train(model, loss, config, "lm", lambda: lm_accuracy(model, tokenizer, world=world))
    recipe["data"] = f"descriptions, captions and questions of the {config.data}, train split"
    recipe["format"] = "[description] </s> Question: ... Answer: ... <end>; stage 2 puts soft prompts in its place"

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        lm_tokenizer(world).save_pretrained(folder)  # `tokenizer` keeps the padding of its last call

    _write(save, config.output / "opt", recipe)
    return recipe["metrics"]


def scene_text(index: int, config: LmConfig, tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Token ids of a training scene: description and segments, each with its number of target tokens at the end."""
    world = WORLDS[config.data]
    scene = world.draw("train", index)
    rng = random.Random(f"{scene.key}/lm/{config.seed}")
    words = world.description(scene, rng).split()
    if rng.random() < 0.1:  # soft prompts are incomplete, too
        words = [word for word in words if rng.random() > 0.1]
    asked = world.ask_evenly(scene, config.questions_per_scene)
    pairs = [(QUESTION_PROMPT.format(question=question.question), str(question.answer)) for question in asked]
    pairs.append((CAPTION_PROMPT, world.caption(scene, ALT_TEXT)))

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    segments = [(encoded(" ".join(words)), 0)]
    for prompt, text in pairs:
        learned = [*encoded(text), tokenizer.eos_token_id]
        segments.append(([tokenizer.bos_token_id, *encoded(prompt), *learned], len(learned)))
    return segments


def pack(scenes: list[list[tuple[list[int], int]]], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Pack descriptions and their segments, each with its number of target tokens at the end, into one batch.

    Returns input_ids int64[B, T], position_ids int64[B, T], attention_mask float[B, 1, T, T] (0 or -inf, added to the
    scores) and targets int64[B, T] (the next token, or -100 without loss).
    """
    length = max(sum(len(segment) for segment, _ in segments) for segments in scenes)
    ids = np.full((len(scenes), length), tokenizer.pad_token_id)
    targets = np.full((len(scenes), length), -100)
    positions = np.zeros((len(scenes), length), np.int64)
    owner = np.full((len(scenes), length), -1)  # 0 the description, 1.. the segments, -1 padding
    for row, segments in enumerate(scenes):
        start = 0
        for number, (segment, learned) in enumerate(segments):
            end = start + len(segment)
            ids[row, start:end] = segment
            if learned:
                targets[row, end - 1 - learned : end - 1] = segment[-learned:]
            first = 0 if number == 0 else len(segments[0][0])
            positions[row, start:end] = np.arange(first, first + len(segment))
            owner[row, start:end] = number
            start = end
    group = torch.from_numpy(owner)
    sees = (group[:, None, :] == group[:, :, None]) | ((group[:, None, :] == 0) & (group[:, :, None] > 0))
    sees &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": mask[:, None],
        "targets": torch.from_numpy(targets),
    }


@torch.no_grad()
def lm_accuracy(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, scenes: int = 300, world: World = SCENES
) -> dict[str, float]:
    """Fraction of validation questions answered from the full description by generation: overall and by type."""
    model.eval()
    asked = _scenes(world, "validation", 0, scenes)
    questions = [(scene, question) for scene in asked for question in world.ask_evenly(scene, 4)]
    right: dict[str, list[bool]] = {}
    for first in range(0, len(questions), 200):
        batch = questions[first : first + 200]
        prompts = [f"{world.description(scene)} </s> Question: {q.question} Answer:" for scene, q in batch]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)  # type: ignore[misc]
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, question), answer in zip(batch, answers, strict=True):
            right.setdefault(question.question_type, []).append(answer.strip() == question.answer)
    metrics = {"accuracy": float(np.mean([r for rs in right.values() for r in rs]))}
    return metrics | {f"accuracy_{kind}": float(np.mean(rs)) for kind, rs in sorted(right.items())}


def normalised(images: np.ndarray, mean: list[float], std: list[float]) -> Tensor:
    """uint8[B, H, W, 3] -> float32[B, 3, H, W] normalised with an encoder's mean and standard deviation."""
    return scaled(torch.from_numpy(images).permute(0, 3, 1, 2), images.shape[1], mean, std, torch.float32)


def _scenes(world: World, split: str, first: int, count: int) -> list[Any]:
    return [world.draw(split, index) for index in range(first, first + count)]


def _images(world: World, scenes: list[Any]) -> np.ndarray:
    return np.stack([world.render(scene) for scene in scenes])


def _train(
    model: PreTrainedModel,
    loss_at: Callable[[int], Tensor],
    config: Training,
    label: str,
    evaluate: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """Train on one thread and evaluate; return the recipe, to which the caller adds the data."""
    torch.set_num_threads(1)
    started = time.time()
    _optimise(model, loss_at, config.steps, config.learning_rate, label)
    return {
        "command": config.command,
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "config": {key: value for key, value in asdict(config).items() if key != "output"},
        "metrics": evaluate(),
        **provenance(started),
    }


def _optimise(
    model: PreTrainedModel, loss_at: Callable[[int], Tensor], steps: int, learning_rate: float, label: str
) -> None:
    """AdamW, warmup, cosine to zero, gradients clipped at 1. Raises FloatingPointError if a loss is not finite."""
    model.set_attn_implementation("eager")  # on a CPU in bf16, sdpa's backward pass takes several times as long
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    warm_up = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    progress = tqdm(range(steps), desc=label, mininterval=5)
    for step in progress:
        loss = loss_at(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{label}: loss {loss.item()} at step {step}")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def provenance(started: float) -> dict[str, Any]:
    """Seconds since `started` (as of `time.time()`), machine and versions."""
    return {
        "seconds": round(time.time() - started),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _write(save: Callable[[Path], Any], folder: Path, recipe: dict[str, Any]) -> None:
    """Write a model and its recipe to `folder`, atomically."""
    with atomic_path(folder) as partial:
        partial.mkdir()
        save(partial)
        (partial / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
