"""Use a trained model on images: `xformer caption`, `ask`, `features` and `reconstruct`.

`generate` is the one way in which a language model answers: the commands, `evaluate` and lmms-eval all call it, so
they agree in precision, prompt and decoding. An image is a path, or `scene:SPLIT:INDEX` (e.g. scene:test:3) for a scene
of the embedded world. Each command prints its results and returns them; `--json` prints JSON.

B images, R prompts, T tokens, as in model/.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file

from xformer_mllm import defaults
from xformer_mllm.checkpoints import bf16_is_fast, load_model, model_folder
from xformer_mllm.commands import (
    ANSWER_TOKENS,
    SCENES,
    AskConfig,
    CaptionConfig,
    FeaturesConfig,
    InferenceConfig,
    ReconstructConfig,
)
from xformer_mllm.data.questions import CAPTION_PROMPT, QUESTION_PROMPT
from xformer_mllm.files import atomic_path, read_json
from xformer_mllm.model import masks
from xformer_mllm.model.images import load_image
from xformer_mllm.model.modeling_xformer import (
    XFormerForConditionalGeneration,
    XFormerForPreTraining,
    XFormerModelOutput,
)
from xformer_mllm.report.reconstructions import panel_grid, reconstructions, to_panels

KINDS = (XFormerForPreTraining, XFormerForConditionalGeneration)
FEATURES = ("clip_tokens", "mae_tokens", "queries", "fused_queries", "enriched_mae_tokens")
SCENE_SIZE = (48, 48)  # pixels of a scene of the embedded world
LAVIS_WORDS = 50  # longest question after LAVIS's processor


# ---------------------------------------------------------------------------------------------------------- generation


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Prompt and decoding. Scores with different settings do not compare."""

    prompt: str
    """Text after the image; {question} is replaced."""
    num_beams: int
    """Number of beams; 1 is greedy. There is no sampling."""
    length_penalty: float
    """Exponent of the length that divides a beam's log-probability; used with several beams."""
    max_new_tokens: int
    """Maximum number of generated tokens."""
    min_new_tokens: int = 0
    """Minimum number of generated tokens."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens that occurred before; 1 is none."""
    plain_question: bool = False
    """Process questions as LAVIS's blip_question: lower case, without .!"()*#:;~, at most 50 words."""

    def prompt_for(self, question: str = "") -> str:
        """The prompt with a question filled in."""
        if self.plain_question:
            words = question.lower().translate(dict.fromkeys(map(ord, '.!"()*#:;~'))).rstrip().split(" ")
            question = " ".join(words[:LAVIS_WORDS])
        return self.prompt.replace("{question}", question)

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        beams = {"num_beams": self.num_beams, "length_penalty": self.length_penalty}
        return {
            **(beams if self.num_beams > 1 else {}),
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": False,
        }


GREEDY_ANSWER = GenerationSettings(
    prompt=QUESTION_PROMPT, num_beams=1, length_penalty=0.0, max_new_tokens=ANSWER_TOKENS
)
"""For the embedded questions, in `xformer ask` and `xformer evaluate`."""


class Generated(NamedTuple):
    """A text, not stripped, and the product of its tokens' probabilities, the end token's included, if asked for."""

    text: str
    probability: float | None = None


@torch.inference_mode()
def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    pixel_values: torch.Tensor | None,
    image_index: torch.Tensor | None = None,
    probabilities: bool = False,
    **options: Any,
) -> list[Generated]:
    """Answer prompts with a stage-2 model, in bf16 where it is fast.

    Args:
        prompts: R texts, each after its image.
        pixel_values: uint8[B, 3, S, S], on the model's device; None if `features` are among the options.
        image_index: int64[R], each prompt's image; None if prompt and image have the same index.
        probabilities: also return each text's probability; only without beams and sampling.
        options: arguments of `XFormerForConditionalGeneration.generate`; max_new_tokens is required, and reduced where
            the language model has fewer positions left.

    Raises:
        ValueError: if a prompt is longer than the language model reads.
    """
    device = model.device if pixel_values is None else pixel_values.device
    text = processor(text=list(prompts)).to(device)
    most = most_new_tokens(model, text["attention_mask"], options["max_new_tokens"])
    options |= {"max_new_tokens": most, "min_new_tokens": min(options.get("min_new_tokens", 0), most)}
    if image_index is not None:
        options["image_index"] = image_index.to(device)
    if probabilities:
        options |= {"return_dict_in_generate": True, "output_logits": True}
    with bf16_autocast(device):
        output = model.generate(pixel_values=pixel_values, **text, **options)
    found: list[Any] = [None] * len(prompts)
    if probabilities:
        logits = torch.stack(output.logits, 1)  # [R, T, V], before any processing such as min_new_tokens
        output = output.sequences[:, -logits.shape[1] :]
        found = _probabilities(logits, output, model.generation_config.eos_token_id)
    elif model.config.text_config.is_encoder_decoder:
        output = output[:, 1:]  # its start token
    else:
        output = output[:, text["input_ids"].shape[1] :]
    return list(map(Generated, processor.tokenizer.batch_decode(output, skip_special_tokens=True), found))


def _probabilities(logits: torch.Tensor, tokens: torch.Tensor, end: int | list[int] | None) -> list[float]:
    """Product over [R, T] of the tokens' probabilities up to the first end token; logits [R, T, V]."""
    logs = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ends = torch.isin(tokens, torch.tensor([] if end is None else end, device=tokens.device))
    padding = ends.cumsum(1) - ends.long() > 0
    return logs.masked_fill(padding, 0.0).sum(1).exp().tolist()


@torch.inference_mode()
def alternatives(model: Any, processor: Any, prompt: str, number: int, **options: Any) -> list[Generated]:
    """The most probable answers to a prompt with their probabilities, best first, by beam search.

    Args:
        number: of answers, and of beams.
        options: arguments of `XFormerForConditionalGeneration.generate`: pixel_values or features of one image, and
            max_new_tokens.
    """
    text = processor(text=[prompt]).to(model.device)
    options["max_new_tokens"] = most_new_tokens(model, text["attention_mask"], options["max_new_tokens"])
    beams = {"num_beams": number, "num_return_sequences": number, "length_penalty": 0.0, "do_sample": False}
    with bf16_autocast(model.device):
        output = model.generate(
            **text, **beams, **options, min_new_tokens=1, return_dict_in_generate=True, output_scores=True
        )
    start = 1 if model.config.text_config.is_encoder_decoder else text["input_ids"].shape[1]
    texts = processor.tokenizer.batch_decode(output.sequences[:, start:], skip_special_tokens=True)
    # Without a length penalty a beam's score is the sum of its tokens' log-probabilities.
    return list(map(Generated, texts, output.sequences_scores.exp().tolist()))


def generate_by_qformer(model: Any, processor: Any, pixel_values: torch.Tensor, most: int) -> list[Generated]:
    """Caption with a stage-1 model: uint8[B, 3, S, S] -> B texts and their probabilities."""
    tokenizer = processor.qformer_tokenizer
    with bf16_autocast(pixel_values.device):
        tokens = model.caption(pixel_values, tokenizer.sep_token_id, max_new_tokens=most)
        start = torch.full_like(tokens[:, :1], model.config.text_start_token_id)
        read = torch.cat([start, tokens[:, :-1]], dim=1)
        mask = masks.multimodal_causal_mask(torch.ones_like(read), model.config.num_query_tokens)
        states = model.xformer.read(model.xformer.encode_image(pixel_values), read, mask).text_states
        found = _probabilities(model.itg_logits(states), tokens, tokenizer.sep_token_id)
    return list(map(Generated, tokenizer.batch_decode(tokens, skip_special_tokens=True), found))


def bf16_autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast where the hardware has it, else no autocast: the precision of every answer and score."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast())


def most_new_tokens(model: Any, attention_mask: torch.Tensor, most: int) -> int:
    """How many tokens may follow the prompts: `most`, or fewer where the language model has fewer positions left.

    Args:
        attention_mask: int64[R, T], 1 at a prompt or its image.

    Raises:
        ValueError: if a prompt is longer than the language model reads.
    """
    config, length = model.config.text_config, int(attention_mask.sum(1).max())
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return most
    if length > positions:
        raise ValueError(
            f"the prompt is {length:,} tokens with the image's, the language model reads at most {positions:,}; "
            "shorten it"
        )
    # The last new token is never read. An encoder-decoder counts the positions of its output separately.
    return min(most, positions if config.is_encoder_decoder else positions - length + 1)


# ------------------------------------------------------------------------------------------------------------ settings


# ------------------------------------------------------------------------------------------------------------ commands


@torch.inference_mode()
def caption(config: CaptionConfig) -> list[dict[str, Any]]:
    """Run `xformer caption`: [{"image", "caption", "probability"}]. Raises ValueError or FileNotFoundError."""
    folder, model, processor = _load(config, "xformer-stage1", KINDS)
    if isinstance(model, XFormerForConditionalGeneration) and _run_settings(folder).get("text") == "questions":
        print(
            f"{folder}: trained on questions; a stage-1 model, or a stage-2 model trained on captions, captions better",
            file=sys.stderr,
        )
    rows: list[dict[str, Any]] = []
    for names, pixels in _batches(config, config.images, model, processor, folder):
        if isinstance(model, XFormerForPreTraining):
            found = generate_by_qformer(model, processor, pixels, config.max_new_tokens)
        else:
            settings = replace(GREEDY_ANSWER, prompt=CAPTION_PROMPT, max_new_tokens=config.max_new_tokens)
            found = _answers(model, processor, [""] * len(names), pixels, None, settings)
        for name, (text, probability) in zip(names, found, strict=True):
            rows.append({"image": name, "caption": readable(text), "probability": probability})
    _print_texts(config, rows, "image", "caption")
    return rows


@torch.inference_mode()
def ask(config: AskConfig) -> list[dict[str, Any]]:
    """Run `xformer ask`: [{"image", "question", "answer", "probability"}]."""
    if not any(question.strip() for question in config.questions):
        raise ValueError('ask a question, e.g. xformer ask photo.jpg "What colour is the circle?"')
    for number, question in enumerate(config.questions, 1):
        if not question.strip():
            raise ValueError(f"question {number} of {len(config.questions)} is empty; leave it out")
    folder, model, processor = _load(config, "xformer", [XFormerForConditionalGeneration])
    ((_, pixels),) = _batches(config, [config.image], model, processor, folder)
    settings = replace(GREEDY_ANSWER, max_new_tokens=config.max_new_tokens)
    rows: list[dict[str, Any]] = []
    for questions in _chunks(config.questions, config.batch_size):
        index = torch.zeros(len(questions), dtype=torch.long)
        found = _answers(model, processor, [question.strip() for question in questions], pixels, index, settings)
        for question, (text, probability) in zip(questions, found, strict=True):
            row = {"image": config.image, "question": question, "answer": readable(text), "probability": probability}
            rows.append(row)
    _print_texts(config, rows, "question", "answer")
    return rows


@torch.inference_mode()
def features(config: FeaturesConfig) -> dict[str, Any]:
    """Run `xformer features`: {"file", "images", "shapes": {feature: shape}}; the tensors are in the file."""
    _check_output(config.output, "features.safetensors")
    attention = "eager" if config.attention else None  # other implementations do not return attention maps
    folder, model, processor = _load(config, "xformer", KINDS, attention)
    batches = [
        _tensors(model.xformer(pixels, output_attentions=config.attention))
        for _, pixels in _batches(config, config.images, model, processor)
    ]
    tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    with atomic_path(config.output) as partial:
        save_file(tensors, partial, metadata={"images": json.dumps(config.images), "model": str(folder)})
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    found = {"file": str(config.output), "images": list(config.images), "shapes": shapes}
    lines = [f"  {name:22}{shape}" for name, shape in shapes.items()]
    print(json.dumps(found) if config.json else "\n".join([str(config.output), *lines]))
    return found


@torch.inference_mode()
def reconstruct(config: ReconstructConfig) -> list[dict[str, Any]]:
    """Run `xformer reconstruct`: [{"image", "file", "mae_error", "xformer_error"}].

    The errors are mean squared errors over the masked pixels, whose values are in [0, 1].
    """
    if not 0 < config.mask_ratio < 1:
        raise ValueError(f"--mask-ratio must be above 0 and below 1, not {config.mask_ratio}")
    _check_output(config.output, "reconstruction.png")
    folder, model, processor = _load(config, "xformer-stage1", KINDS)
    if model.xformer.mae_decoder is None:
        raise ValueError(f"{folder}: this variant has no reconstruction; train one with --variant xformer")
    found: list[dict[str, Any]] = []
    rows: list[dict[str, Image.Image]] = []
    for names, pixels in _batches(config, config.images, model, processor):
        images = reconstructions(model, pixels, config.mask_ratio, config.seed)
        hidden = images.pop("hidden")
        errors = {
            key: ((images[label] - images["original"]).square() * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3))
            for key, label in (("mae_error", "MAE"), ("xformer_error", "X-Former"))
        }
        rows += to_panels(images)
        for index, name in enumerate(names):
            measured = {key: error[index].item() for key, error in errors.items()}
            found.append({"image": name, "file": str(config.output), **measured})
    with atomic_path(config.output) as partial:
        panel_grid(rows).save(partial, format="PNG")
    if config.json:
        print(json.dumps(found))
    else:
        print(f"{config.output}; mean squared error over the masked pixels:")
        for row in found:
            print(f"  {row['image']}: MAE {row['mae_error']:.4f}, X-Former {row['xformer_error']:.4f}")
    return found


# --------------------------------------------------------------------------------------------------- models and images


def _load(
    config: InferenceConfig, shipped: str, kinds: Sequence[Any], attention: str | None = None
) -> tuple[Path, Any, Any]:
    """Folder, model and processor of --model, or of a shipped model."""
    images = getattr(config, "images", True)
    if not images:
        raise ValueError("name at least one image: a path, or scene:test:0 for a scene of the embedded world")
    folder = config.model or defaults.shipped_model(shipped)
    return folder, *load_model(folder, kinds, attention)


def _run_settings(model: Path) -> dict[str, Any]:
    """The configuration of the run that trained a model; {} if it is unknown."""
    folder = model_folder(model).absolute()
    if folder.parent == defaults.shipped_model().parent:
        return read_json(folder / "recipe.json")["trained_by"]
    run = folder.parent / "config.json"
    return read_json(run) if folder.name == "model" and run.is_file() else {}


def open_image(name: str) -> Image.Image:
    """Open a path or scene:SPLIT:INDEX as RGB. Raises ValueError or FileNotFoundError."""
    return defaults.scene(name) if name.startswith("scene:") else load_image(name)


def _batches(
    config: InferenceConfig, names: Sequence[str], model: Any, processor: Any, folder: Path | None = None
) -> Iterator[tuple[Sequence[str], torch.Tensor]]:
    """Names and pixels uint8[B, 3, S, S]; warns of images unlike the training data of the model in `folder`."""
    only_scenes = folder is not None and _run_settings(folder).get("data") in SCENES
    for batch in _chunks(names, config.batch_size):
        images = [open_image(name) for name in batch]
        for name, image in zip(batch, images, strict=True):
            if only_scenes and image.size != SCENE_SIZE:
                print(
                    f"{name}: not a scene; {folder} was trained on the embedded scenes alone, so expect a wrong text",
                    file=sys.stderr,
                )
                only_scenes = False
        yield batch, processor(images=images)["pixel_values"].to(model.device)


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    if size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {size}")
    return (items[start : start + size] for start in range(0, len(items), size))


def _check_output(path: Path, name: str) -> None:
    """Raises ValueError for a folder, before the work is done. name: of a file in it, for example."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file, e.g. --output {path / name}")


# --------------------------------------------------------------------------------------------------------------- texts


def _answers(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    pixel_values: torch.Tensor,
    image_index: torch.Tensor | None,
    settings: GenerationSettings,
) -> list[Generated]:
    """Answers of at least one token, with probabilities."""
    prompts = [settings.prompt_for(question) for question in questions]
    options = settings.options() | {"min_new_tokens": 1}
    return generate(model, processor, prompts, pixel_values, image_index, probabilities=True, **options)


def readable(text: str) -> str:
    """A text for people: a word that repeats itself ("6 6 6") stands once; "(no text)" if nothing is left.

    Only `ask` and `caption` do this: `evaluate` scores a model's text as it is.
    """
    return re.sub(r"(?<!\S)(\S+)(?:\s+\1(?!\S))+", r"\1", text.strip()) or "(no text)"


def _print_texts(config: InferenceConfig, rows: list[dict[str, Any]], key: str, value: str) -> None:
    """Print a single text alone, several each after its image or question."""
    if config.json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        label = "" if len(rows) == 1 else f"{row[key]} " if row[key].endswith("?") else f"{row[key]}: "
        share = f"{row['probability']:.2f}" if row["probability"] >= 0.005 else "below 0.01"
        print(f"{label}{row[value]}  (probability {share})")


def _tensors(output: XFormerModelOutput) -> dict[str, torch.Tensor]:
    """The features that the variant has, and attention maps by layer number."""
    tensors = {name: output[name] for name in FEATURES if output.get(name) is not None}
    for name in ("clip_attentions", "mae_attentions"):
        for number, attention in enumerate(output.get(name) or ()):
            tensors[f"{name}.{number}"] = attention
    # clone: in a variant without fusion Z' is Z_q itself, and safetensors refuses shared tensors.
    return {name: tensor.float().cpu().contiguous().clone() for name, tensor in tensors.items()}
