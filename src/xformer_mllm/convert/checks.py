"""The written model against its sources: the same example, the same answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xformer_mllm.convert.plan import ATTENDS, READS_TEXT, SECOND_ENCODER, TOWER, Plan
from xformer_mllm.convert.references import (
    Answers,
    Example,
    bert_reference,
    make_example,
    qformer_reference,
    second_reference,
    tower_reference,
)
from xformer_mllm.convert.target import Target
from xformer_mllm.model.modeling_xformer import XFormerForConditionalGeneration, XFormerForImageTextRetrieval

# Of the largest difference, relative to the largest value.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3, "float16": 1e-3}


@dataclass(frozen=True)
class Check:
    """One comparison of the written model with a source: the largest difference, relative to the largest value."""

    what: str
    against: str
    difference: float
    tolerance: float

    def demand(self) -> None:
        """Raises ValueError if the difference is too large."""
        if not self.difference <= self.tolerance:  # nan is a difference, too
            raise ValueError(
                f"{self.what}: the new model is {self.difference:.1e} away from {self.against} (of the largest value; at "
                f"most {self.tolerance:.0e}), so it is not kept; were the sources made for each other?"
            )


@torch.no_grad()
def verify(folder: Path, plan: Plan, target: Target) -> list[Check]:
    """Compare what the sources say with what the written model says, but for what depends on initialised tensors."""
    sources, example = target.sources, make_example(target.config, target.processor)
    expected = {}
    if not plan.initialises(TOWER):
        tokens = tower_reference(target, example)
        expected["CLIP tokens"] = (sources.tower, tokens)
        if sources.kind != "bert":
            for name, answer in qformer_reference(target, plan, example, tokens).items():
                expected[name] = (sources.qformer, answer)
    if sources.kind == "bert" and not target.stage2 and not plan.initialises(ATTENDS, READS_TEXT):
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
    """The largest difference, relative to the largest value; of vocabularies that differ, of their common part."""
    ours, theirs = torch.atleast_1d(ours.float()), torch.atleast_1d(theirs.float())
    columns = min(ours.shape[-1], theirs.shape[-1])
    theirs = theirs[..., :columns]
    return ((ours[..., :columns] - theirs).abs().max() / theirs.abs().max()).item()


def own_answers(model: Any, example: Example) -> Answers:
    """All that the written model says of the example."""
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
        return answers | {"logits": model(example.pixels, *example.question).logits}
    scores = XFormerForImageTextRetrieval.forward
    answers["ITC scores"] = scores(model, example.pixels, *example.caption).logits_per_image
    answers["ITM logits"] = scores(model, example.pixels, *example.caption, True).logits_per_image
    answers["text states"] = xformer.encode_text(*example.caption)
    return answers
