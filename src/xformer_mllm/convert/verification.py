"""Compare the written model with its sources on one example, and report the conversion.

The sources run in their own code: transformers' classes, or LAVIS's steps for its files. One source is loaded at a time.

`N` CLIP tokens, `Q` queries, `L` MAE patches, `S` the image's side, `D` width. Z_q: the Q-Former's output.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerModel,
    Blip2VisionConfig,
    PreTrainedModel,
    ViTMAEForPreTraining,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPooling

from xformer_mllm.convert.assembly import (
    ATTENDS,
    LANGUAGE_MODEL,
    PROJECTION,
    READS_IMAGES,
    READS_TEXT,
    SCORES,
    SECOND_ENCODER,
    TOWER,
    Plan,
    Target,
    part_of,
)
from xformer_mllm.convert.layouts import Pieces, as_they_are, mae_pieces
from xformer_mllm.convert.sources import Source
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import (
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    language_model_class,
)
from xformer_mllm.model.processing_xformer import XFormerProcessor
from xformer_mllm.model.vision_encoders import build_tower, scaled, tower_tokens

LN_VISION_EPSILON = 1e-5  # LAVIS blip2.py; the same layer in transformers, post_layernorm, has 1e-6
CAPTION = "a photo of a red circle"
QUESTION = "Question: what is in the image? Answer:"

Answers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """The test image, uint8[1, 3, S, S], the noise [1, L] for its masking, and ids and mask of two texts.

    caption: for the Q-Former. question: for the language model, with placeholders; empty without one, and cut to the
    tokens that it can read. answer: the decoder's input if the language model is an encoder-decoder, else None.
    """

    pixels: torch.Tensor
    noise: torch.Tensor | None
    caption: tuple[torch.Tensor, torch.Tensor]
    question: tuple[torch.Tensor, ...]
    answer: torch.Tensor | None

    def seen_by_clip(self, config: XFormerConfig, dtype: torch.dtype) -> torch.Tensor:
        """Return the test image as the CLIP tower's input."""
        return scaled(self.pixels, config.clip_config.image_size, config.clip_mean, config.clip_std, dtype)


def make_example(config: XFormerConfig, processor: XFormerProcessor) -> Example:
    """Return a fixed example: an image of waves in three colours, and two sentences."""
    side = torch.linspace(0, 1, config.clip_config.image_size)
    rows, columns = side[:, None], side[None, :]
    waves = [torch.sin(9 * rows + 4 * columns), torch.cos(23 * columns * rows), torch.sin(40 * columns) * rows]
    pixels = ((torch.stack(waves) + 1) * 127.5).to(torch.uint8)[None]
    noise = None
    question: tuple[torch.Tensor, ...] = ()
    answer = None
    if config.reconstruction:
        length = (config.mae_image_size // config.mae_config.patch_size) ** 2
        noise = torch.rand(1, length, generator=torch.Generator().manual_seed(0))
    if config.text_config is not None:
        text, positions = processor(text=QUESTION), getattr(config.text_config, "max_position_embeddings", None)
        question = text["input_ids"][:, :positions], text["attention_mask"][:, :positions]
        if processor.encoder_decoder:
            answer = torch.tensor(processor.target_ids([QUESTION], [CAPTION]))[:, :positions]
    caption = processor.qformer_inputs([CAPTION])
    return Example(pixels, noise, (caption["qformer_input_ids"], caption["qformer_attention_mask"]), question, answer)


def tower_reference(target: Target, example: Example) -> torch.Tensor:
    """Return C before its layer norm, [1, N, D], from the hidden states of the tower's own class."""
    config = target.config
    tower = filled(lambda: build_tower(config.clip_config), target.tower_pieces, "vision_model.", target.dtype)
    states = tower(example.seen_by_clip(config, target.dtype), output_hidden_states=True).hidden_states
    return states[config.clip_feature_layer]


def filled(build: Callable[[], nn.Module], pieces: Pieces, prefix: str, dtype: torch.dtype) -> Any:
    """Build a transformers module and copy a source's tensors into it, one at a time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            module = build().eval()
    finally:
        torch.set_default_dtype(before)
    for name, tensor in module.state_dict().items():
        if prefix + name in pieces:
            tensor.copy_(pieces[prefix + name].tensor())
    return module


def qformer_reference(target: Target, plan: Plan, example: Example, tokens: torch.Tensor) -> Answers:
    """Return a BLIP-2's queries, and its scores or logits. `tokens`: C before its layer norm."""
    config, pieces = target.config, target.pieces
    if config.fusion == "concat" or plan.initialises(ATTENDS, READS_IMAGES):
        return {}  # the queries differ from the source's by design
    weight, bias = (pieces[f"vision_model.post_layernorm.{name}"].tensor().float() for name in ("weight", "bias"))
    states = nn.functional.layer_norm(tokens.float(), weight.shape, weight, bias, LN_VISION_EPSILON)
    qformer = filled(lambda: Blip2QFormerModel(config.qformer_config), pieces, "qformer.", torch.float32)
    query_tokens = pieces["query_tokens"].tensor().float()
    queries = qformer(query_embeds=query_tokens, encoder_hidden_states=states).last_hidden_state
    answers = {"queries": queries}
    if target.stage2 and not plan.initialises(PROJECTION, LANGUAGE_MODEL):
        answers["logits"] = logits_reference(target, example, queries)
    if not target.stage2 and not plan.initialises(READS_TEXT, SCORES):
        answers |= scores_reference(target, example, states)
    return answers


def bert_reference(source: Source, example: Example) -> torch.Tensor:
    """Return BERT's states of the caption, without token types, as in LAVIS."""
    bert = BertModel.from_pretrained(source.folder, dtype="float32").eval()
    bert.embeddings.token_type_embeddings.weight.zero_()
    return bert(*example.caption).last_hidden_state


def load_blip2(kind: type[PreTrainedModel], target: Target) -> Any:
    """Load a BLIP-2 with transformers: trainable parts in float32, frozen parts in `target.dtype`."""
    trained = ["query_tokens", "qformer", r"^embeddings\.", "(language|vision|text)_projection", "itm_head"]
    ours: Any = type(kind.__name__, (kind,), {"_keep_in_fp32_modules_strict": [*trained, "post_layernorm"]})
    model = ours.from_pretrained(target.sources.qformer.folder, dtype=target.dtype).eval()
    norm = model.vision_model.post_layernorm
    norm.eps = LN_VISION_EPSILON
    norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return model


class FixedTower(nn.Module):
    """Replaces a BLIP-2's vision tower and returns another tower's states."""

    def __init__(self, states: torch.Tensor):
        super().__init__()
        self.states = states

    def forward(self, *_, **__) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.states)


def scores_reference(target: Target, example: Example, states: torch.Tensor) -> Answers:
    """Return a stage-1 BLIP-2's scores of image and caption. `states`: C after its layer norm, [1, N, D]."""
    config = target.config
    if target.sources.whole_blip2:
        model = load_blip2(Blip2ForImageTextRetrieval, target)
        pixels = example.seen_by_clip(config, target.dtype)
    else:
        no_tower = Blip2VisionConfig(hidden_size=states.shape[-1], num_attention_heads=1, num_hidden_layers=0)
        blip2 = Blip2Config(
            vision_config=no_tower,
            qformer_config=config.qformer_config,
            num_query_tokens=config.num_query_tokens,
            image_text_hidden_size=config.image_text_hidden_size,
        )
        pieces = {name: piece for name, piece in target.pieces.items() if not name.startswith("vision_model.")}
        model = filled(lambda: Blip2ForImageTextRetrieval(blip2), pieces, "", torch.float32)
        model.vision_model, pixels = FixedTower(states), example.pixels
    model.config.image_token_index = None  # no placeholders in the caption
    return {
        "ITC scores": model(pixels, *example.caption, return_dict=True).logits_per_image,
        "ITM logits": model(pixels, *example.caption, True, return_dict=True).logits_per_image,
    }


def logits_reference(target: Target, example: Example, queries: torch.Tensor) -> torch.Tensor:
    """Return the language model's logits for the question after the image. `queries`: Z_q, [1, Q, D]."""
    llm = target.sources.llm
    assert llm is not None
    ids, mask = example.question
    at = ids.eq(target.processor.image_token_id)
    if target.sources.whole_blip2:
        model = load_blip2(Blip2ForConditionalGeneration, target)
        unused = next(number for number in range(ids.numel() + 1) if number not in ids)
        model.config.image_token_index = unused  # the two models' placeholders may differ
        pixels = example.seen_by_clip(target.config, target.dtype)
        return model(pixels, ids.masked_fill(at, unused), mask, decoder_input_ids=example.answer).logits
    weight, bias = (target.pieces[f"language_projection.{name}"].tensor().float() for name in ("weight", "bias"))
    kind = language_model_class(llm.config)
    model = kind.from_pretrained(llm.folder, config=llm.config, dtype=target.dtype).eval()
    embeds = model.get_input_embeddings()(ids[:, at.sum() :])
    prompt = nn.functional.linear(queries, weight, bias).to(embeds.dtype)
    decoder = {} if example.answer is None else {"decoder_input_ids": example.answer}
    return model(inputs_embeds=torch.cat([prompt, embeds], dim=1), attention_mask=mask, **decoder).logits


def second_reference(source: Source, target: Target, example: Example) -> tuple[str, torch.Tensor]:
    """Return a MAE's own reconstruction loss, or without reconstruction the second encoder's tokens."""
    config, dtype = target.config, target.dtype
    pixels = scaled(example.pixels, config.mae_image_size, config.mae_mean, config.mae_std, dtype)
    if not config.has_mae:
        tower = filled(lambda: build_tower(config.mae_config), as_they_are(source), "", dtype)
        return "second encoder's tokens", tower_tokens(tower, pixels)
    own = copy.deepcopy(source.config)
    own.mask_ratio = config.mask_ratio if config.reconstruction else 0.0
    if source.folder is None:
        mae = filled(lambda: ViTMAEForPreTraining(own), mae_pieces(source), "", dtype)
    else:
        mae = ViTMAEForPreTraining.from_pretrained(source.folder, config=own, dtype=dtype).eval()
    if not config.reconstruction:
        order = torch.arange(mae.vit.embeddings.patch_embeddings.num_patches)[None]
        return "second encoder's tokens", mae.vit(pixels, noise=order).last_hidden_state
    # The loss is taken in float32, as in this package, whatever dtype the MAE computes in.
    mae.vit.embeddings.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))
    mae.decoder.decoder_pred.register_forward_hook(lambda _module, _inputs, output: output.float())
    return "reconstruction loss", mae(pixels.float(), noise=example.noise).loss


# The largest allowed difference, relative to the largest value. Two neighbouring numbers in fp16 are 1e-3 apart.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3, "float16": 2e-3}


@dataclass(frozen=True)
class Check:
    """One comparison of the written model with a source: the largest difference, relative to the largest value."""

    what: str
    against: str
    difference: float
    tolerance: float


@torch.no_grad()
def verify(folder: Path, plan: Plan, target: Target) -> list[Check]:
    """Compare the written model's outputs with the sources', except where initialised tensors take part."""
    sources, example = target.sources, make_example(target.config, target.processor)
    expected = {}
    if not plan.initialises(TOWER):
        tokens = tower_reference(target, example)
        expected["CLIP tokens"] = (sources.tower, tokens)
        if sources.qformer.kind != "bert":
            for name, answer in qformer_reference(target, plan, example, tokens).items():
                expected[name] = (sources.qformer, answer)
    if sources.qformer.kind == "bert" and not target.stage2 and not plan.initialises(ATTENDS, READS_TEXT):
        expected["text states"] = (sources.qformer, bert_reference(sources.qformer, example))
    if sources.mae is not None and not plan.initialises(SECOND_ENCODER):
        name, answer = second_reference(sources.mae, target, example)
        expected[name] = (sources.mae, answer)
    found = own_answers(type(target.model).from_pretrained(folder).eval(), example)
    return [
        Check(name, source.label, difference(found[name], answer), TOLERANCE[target.settings.dtype])
        for name, (source, answer) in expected.items()
    ]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value, over the common part of the vocabularies."""
    ours, theirs = torch.atleast_1d(ours.float()), torch.atleast_1d(theirs.float())
    columns = min(ours.shape[-1], theirs.shape[-1])
    theirs = theirs[..., :columns]
    return ((ours[..., :columns] - theirs).abs().max() / theirs.abs().max()).item()


def own_answers(model: Any, example: Example) -> Answers:
    """Return the written model's outputs on the example."""
    config, xformer = model.config, model.xformer
    tower, image = xformer.clip_encoder, xformer.encode_image(example.pixels)
    seen = example.seen_by_clip(config, next(tower.parameters()).dtype)
    answers = {"CLIP tokens": tower(seen)[0], "queries": xformer.read(image).fused_queries}
    if image.mae is not None:
        answers["second encoder's tokens"] = image.mae.tokens
    if config.reconstruction:
        masked = xformer.encode_image(example.pixels, config.mask_ratio, example.noise)
        answers["reconstruction loss"] = xformer.reconstruction_loss(masked, xformer.read(masked))
    if isinstance(model, XFormerForConditionalGeneration):
        logits = model(example.pixels, *example.question, decoder_input_ids=example.answer).logits
        return answers | {"logits": logits}
    scores = XFormerForImageTextRetrieval.forward
    answers["ITC scores"] = scores(model, example.pixels, *example.caption).logits_per_image
    answers["ITM logits"] = scores(model, example.pixels, *example.caption, True).logits_per_image
    answers["text states"] = xformer.encode_text(*example.caption)
    return answers


def summary(plan: Plan, target: Target) -> dict[str, list[dict]]:
    """Return as plain data `parts` (each part's origin) and `left` (unused source tensors)."""
    rows: dict[tuple[str, str, str], dict] = {}
    for name, tensor in target.wanted.items():
        part, dtype = part_of(name), str(tensor.dtype).removeprefix("torch.")
        origin = plan.copied[name].source.label if name in plan.copied else "initialised"
        empty = {"part": part, "from": origin, "tensors": 0, "parameters": 0, "dtype": dtype}
        row = rows.setdefault((part, origin, dtype), empty)
        row["tensors"] += 1
        row["parameters"] += tensor.numel()
    left = [
        {"source": label, "tensors": len(names), "why": reason, "first": names[0]}
        for (label, reason), names in plan.left.items()
    ]
    return {"parts": list(rows.values()), "left": left}


def show_summary(table: dict[str, list[dict]]) -> str:
    parts = table["parts"]
    total = ["total", "", sum(row["tensors"] for row in parts), sum(row["parameters"] for row in parts), ""]
    rows = [*(list(row.values()) for row in parts), total]
    text = _columns(("part", "from", "tensors", "parameters", "dtype"), rows)
    if table["left"]:
        rows = [list(row.values()) for row in table["left"]]
        text += "\n\n" + _columns(("left over in", "tensors", "why", "first"), rows)
    return text


def show_checks(checks: Sequence[Check]) -> str:
    rows = [[c.what, c.against, f"{c.difference:.1e}", f"{c.tolerance:.0e}"] for c in checks]
    return _columns(("on a test image", "against", "largest difference", "allowed"), rows)


def _columns(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table as text, numbers aligned right."""
    shown = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    aligned = []
    for title, *cells in zip(head, *shown, strict=True):
        width, number = max(map(len, (title, *cells))), all(cell[:1].isdigit() for cell in cells)
        aligned.append([cell.rjust(width) if number else cell.ljust(width) for cell in (title, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def record(target: Target, table: dict[str, list[dict]], checks: Sequence[Check]) -> dict[str, Any]:
    """Return the content of conversion.json: settings, revisions, parts and checks."""
    settings = {name: value for name, value in asdict(target.settings).items() if name != "output_dir"}
    folders = {source.label: source.folder for source in target.sources.all() if source.folder}
    revisions = {
        label: path.name for label, path in folders.items() if path.parent.name == "snapshots"
    }  # the Hub's cache
    return {"settings": settings, "revisions": revisions, **table, "checks": [asdict(check) for check in checks]}
