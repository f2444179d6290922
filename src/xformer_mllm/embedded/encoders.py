"""Train the models the package ships: the tiny CLIP, the tiny MAE with its decoder, the tiny OPT, two tokenizers.

Each training sees every training scene once, in order, so nothing can be memorised. All are transformers' classes;
`recipe.json` beside the weights holds the settings and the validation metrics.

Legend: B batch, H height, W width, T text tokens.
"""

import json
import math
import platform
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
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
from xformer_mllm.embedded.scene_questions import ask
from xformer_mllm.embedded.scenes import caption, description
from xformer_mllm.embedded.tokenizers import lm_tokenizer, qformer_tokenizer
from xformer_mllm.embedded.world import IMAGE_SIZE, draw_scene, render
from xformer_mllm.files import atomic_path
from xformer_mllm.model.configuration_xformer import IMAGENET_MEAN, IMAGENET_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from xformer_mllm.model.vision_encoders import scaled


@dataclass
class ClipConfig:
    """Training of CLIP."""

    steps: int = 2500
    """Training steps."""
    batch_size: int = 128
    """Image-caption pairs per step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    width: int = 128
    """Hidden size of both towers."""
    layers: int = 5
    """Layers of the vision tower. X-Former reads the penultimate one."""
    seed: int = 0
    """Seed of the initial weights."""


@dataclass
class MaeConfig:
    """Training of MAE. The decoder has 3 layers of width 96."""

    steps: int = 4000
    """Training steps."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    width: int = 128
    """Hidden size of the encoder."""
    layers: int = 4
    """Layers of the encoder."""
    mask_ratio: float = 0.5
    """Fraction of masked patches."""
    norm_pix_loss: bool = False
    """Normalise the target pixels of each patch."""
    seed: int = 0
    """Seed of the initial weights and the masks."""


@dataclass
class LmConfig:
    """Train the tiny language model on descriptions of scenes, each followed by questions and a caption."""

    output: Path = Path("weights")
    """Folder in which opt/ is written."""
    steps: int = 4000
    """Training steps."""
    batch_size: int = 32
    """Scenes per step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    width: int = 128
    """Hidden size."""
    layers: int = 4
    """Number of layers."""
    questions_per_scene: int = 8
    """Questions after each description."""
    seed: int = 0
    """Seed of the initial weights and the descriptions."""


@dataclass
class EncodersConfig:
    """Train the tiny CLIP and MAE in two parallel one-thread processes, and write the Q-Former's tokenizer."""

    output: Path = Path("weights")
    """Folder in which clip/, mae/ and qformer_tokenizer/ are written."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Training of CLIP."""
    mae: MaeConfig = field(default_factory=MaeConfig)
    """Training of MAE."""


def train_encoders(config: EncodersConfig) -> dict[str, dict[str, float]]:
    """Train and write clip/, mae/ and qformer_tokenizer/ under `config.output`; return their validation metrics."""
    save_qformer_tokenizer(config.output)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        clip = pool.submit(train_clip, config.clip, config.output)
        mae = pool.submit(train_mae, config.mae, config.output)
        return {"clip": clip.result(), "mae": mae.result()}


def save_qformer_tokenizer(output: Path) -> None:
    """Write qformer_tokenizer/ under `output`."""
    tokenizer = qformer_tokenizer()
    data = "words of the scenes' texts and of easy-VQA"
    recipe = {"command": "xformer train encoders", "vocabulary": len(tokenizer), "data": data}
    _write(tokenizer.save_pretrained, output / "qformer_tokenizer", recipe)


def new_clip(config: ClipConfig, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """An untrained CLIP; its text tower (2 layers) is discarded after training."""
    common = {"hidden_size": config.width, "intermediate_size": 4 * config.width, "num_attention_heads": 4}
    vision = {**common, "num_hidden_layers": config.layers, "image_size": IMAGE_SIZE, "patch_size": 8}
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
    model_config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    return CLIPModel(model_config)


def train_clip(config: ClipConfig, output: Path) -> dict[str, float]:
    """Contrastive training on scenes and captions; write clip/ and return its retrieval metrics on validation."""
    torch.set_num_threads(1)
    started = time.time()
    tokenizer = qformer_tokenizer()
    model = new_clip(config, tokenizer)

    def loss(step: int) -> Tensor:
        images, captions = _pairs("train", step * config.batch_size, config.batch_size)
        logits = _clip_logits(model, tokenizer, images, captions)
        target = torch.arange(len(logits))
        return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2

    _optimise(model, loss, config.steps, config.learning_rate, "clip")
    metrics = clip_retrieval(model, tokenizer)
    recipe = _recipe("encoders", config, metrics, started, "scenes and captions, train split, each seen once")
    recipe["pixels"] = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "scale": 1 / 255}
    _write(model.vision_model.save_pretrained, output / "clip", recipe)
    return metrics


def _clip_logits(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, images: np.ndarray, captions: list[str]
) -> Tensor:
    """Similarities images x captions, float[B, B]; the learned scale is at most 50."""
    text = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(
            pixel_values=_pixels(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
        )
    scale = model.logit_scale.exp().clamp(max=50)
    return scale * outputs.image_embeds.float() @ outputs.text_embeds.float().T


@torch.no_grad()
def clip_retrieval(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, rounds: int = 10) -> dict[str, float]:
    """Recall at 1 among 100 validation scenes, both directions, mean over `rounds` (equal captions count as misses)."""
    model.eval()
    text, image = [], []
    for number in range(rounds):
        logits = _clip_logits(model, tokenizer, *_pairs("validation", number * 100, 100))
        target = torch.arange(100)
        text.append((logits.argmax(1) == target).float().mean().item())
        image.append((logits.argmax(0) == target).float().mean().item())
    return {"image_to_text_r1_of_100": float(np.mean(text)), "text_to_image_r1_of_100": float(np.mean(image))}


def new_mae(config: MaeConfig) -> ViTMAEForPreTraining:
    """An untrained MAE with sine-cosine positions (transformers leaves the decoder's at zero)."""
    torch.manual_seed(config.seed)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
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


def train_mae(config: MaeConfig, output: Path) -> dict[str, float]:
    """Masked autoencoding of scenes; write mae/ (encoder and decoder) and return its loss on validation."""
    torch.set_num_threads(1)
    started = time.time()
    model = new_mae(config)
    generator = torch.Generator().manual_seed(config.seed)

    def loss(step: int) -> Tensor:
        images = _pixels(_images("train", step * config.batch_size, config.batch_size), IMAGENET_MEAN, IMAGENET_STD)
        noise = torch.rand(len(images), 36, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            return model(images, noise=noise).loss

    _optimise(model, loss, config.steps, config.learning_rate, "mae")
    metrics = mae_loss(model)
    recipe = _recipe("encoders", config, metrics, started, "scenes, train split, each seen once")
    recipe["pixels"] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "scale": 1 / 255}
    _write(model.save_pretrained, output / "mae", recipe)
    return metrics


@torch.no_grad()
def mae_loss(model: ViTMAEForPreTraining, size: int = 512) -> dict[str, float]:
    """Reconstruction loss on validation scenes with fixed masks, and the variance (the loss of the mean image)."""
    model.eval()
    images = _pixels(_images("validation", 0, size), IMAGENET_MEAN, IMAGENET_STD)
    noise = torch.rand(size, 36, generator=torch.Generator().manual_seed(0))
    return {
        "reconstruction_loss": model(images, noise=noise).loss.item(),
        "variance": images.var(dim=(0, 2, 3)).mean().item(),
    }


def new_lm(config: LmConfig, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """An untrained OPT of the configured size; generation stops at the tokenizer's end token."""
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
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return model


def train_lm(config: LmConfig) -> dict[str, float]:
    """Train on captions and answers after descriptions; write opt/ and return its accuracy on validation.

    A sequence is a description, segments "</s> Question: ... Answer: ... <end>" and one "</s> caption <end>". A segment
    attends to the description and itself, and its positions start after the description: the model learns
    [description][</s> text <end>], the layout of stage 2, where soft prompts replace the description. The loss is on
    captions and answers only: descriptions and questions are random, with little to learn.
    """
    torch.set_num_threads(1)
    started = time.time()
    tokenizer = lm_tokenizer()
    model = new_lm(config, tokenizer)

    def loss(step: int) -> Tensor:
        first = step * config.batch_size
        batch = pack([_scene_text(i, config, tokenizer) for i in range(first, first + config.batch_size)], tokenizer)
        targets = batch.pop("targets")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    _optimise(model, loss, config.steps, config.learning_rate, "lm")
    metrics = lm_accuracy(model, tokenizer)
    recipe = _recipe("lm", config, metrics, started, "descriptions, captions and questions of the scenes, train split")
    recipe["format"] = "[description] </s> Question: ... Answer: ... <end>; stage 2 puts soft prompts in its place"

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        lm_tokenizer().save_pretrained(folder)

    _write(save, config.output / "opt", recipe)
    return metrics


def _scene_text(index: int, config: LmConfig, tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Token ids of a training scene: description and segments, each with its number of target tokens at the end."""
    scene = draw_scene("train", index)
    rng = random.Random(f"{scene.key}/lm/{config.seed}")
    words = description(scene, rng).split()
    if rng.random() < 0.1:  # soft prompts are incomplete, too
        words = [word for word in words if rng.random() > 0.1]
    pairs = [
        (QUESTION_PROMPT.format(question=q.question), str(q.answer)) for q in ask(scene, config.questions_per_scene)
    ]
    pairs.append((CAPTION_PROMPT, caption(scene)))

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

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
def lm_accuracy(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, scenes: int = 300) -> dict[str, float]:
    """Fraction of validation questions answered from the full description by generation: overall and by type."""
    model.eval()
    questions = [(scene, q) for scene in (draw_scene("validation", i) for i in range(scenes)) for q in ask(scene, 4)]
    right: dict[str, list[bool]] = {}
    for first in range(0, len(questions), 200):
        batch = questions[first : first + 200]
        prompts = [f"{description(scene)} </s> Question: {q.question} Answer:" for scene, q in batch]
        inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)  # type: ignore[misc]
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, question), answer in zip(batch, answers, strict=True):
            right.setdefault(question.question_type, []).append(answer.strip() == question.answer)
    metrics = {"accuracy": float(np.mean([r for rs in right.values() for r in rs]))}
    return metrics | {f"accuracy_{kind}": float(np.mean(rs)) for kind, rs in sorted(right.items())}


def _pixels(images: np.ndarray, mean: list[float], std: list[float]) -> Tensor:
    """uint8[B, H, W, 3] -> float32[B, 3, H, W] normalised with an encoder's mean and standard deviation."""
    return scaled(torch.from_numpy(images).permute(0, 3, 1, 2), IMAGE_SIZE, mean, std, torch.float32)


def _images(split: str, first: int, count: int) -> np.ndarray:
    return np.stack([render(draw_scene(split, index)) for index in range(first, first + count)])


def _pairs(split: str, first: int, count: int) -> tuple[np.ndarray, list[str]]:
    scenes = [draw_scene(split, index) for index in range(first, first + count)]
    return np.stack([render(scene) for scene in scenes]), [caption(scene) for scene in scenes]


def _optimise(model: PreTrainedModel, loss_at: Any, steps: int, learning_rate: float, label: str) -> None:
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


def _recipe(command: str, config: Any, metrics: dict[str, float], started: float, data: str) -> dict[str, Any]:
    return {
        "command": f"xformer train {command}",
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "config": {key: value for key, value in asdict(config).items() if key != "output"},
        "metrics": metrics,
        "seconds": round(time.time() - started),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data": data,
    }


def _write(save: Any, folder: Path, recipe: dict[str, Any]) -> None:
    """Write a model and its recipe to `folder`, atomically."""
    with atomic_path(folder) as partial:
        partial.mkdir()
        save(partial)
        (partial / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
