"""For each tensor of the new model where it comes from; what is initialised; what of the sources is left over.

A tensor that is missing, left over or of another shape is an error, unless it is so by design (the reasons below, which
the printed table says) or allowed by name.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from xformer_mllm.convert.configuration import layer_numbers
from xformer_mllm.convert.layouts import BLIP2, MAE, current_mae_name
from xformer_mllm.convert.pieces import Pieces, as_they_are, drop, translate
from xformer_mllm.convert.target import Target, part_of

_LAYER = r"encoder\.layer\.\d+\."
TOWER = r"xformer\.clip_encoder\.(?!tower\.post_layernorm)"
SECOND_ENCODER = r"xformer\.mae_(encoder|decoder)\."
ATTENDS = rf"xformer\.qformer\.(layernorm|{_LAYER}attention)\."
READS_IMAGES = (
    r"xformer\.(query_tokens$|clip_layernorm\.)"
    rf"|xformer\.qformer\.{_LAYER}(crossattention|intermediate_query|output_query)\."
)
READS_TEXT = rf"xformer\.(embeddings|qformer\.{_LAYER}(intermediate|output))\."
SCORES = r"(vision_projection|text_projection|itm_head)\."
WRITES_TEXT = r"itg_|temperature$"
PROJECTION = r"language_projection\."
LANGUAGE_MODEL = r"language_model\."

# What a source of its kind never has: initialised without asking.
ALWAYS_FRESH = r"xformer\.(fusion|clip_encoder\.tower\.post_layernorm)\."  # the latter (a BLIP-2 tower's) is never run
FRESH_BEHIND_BERT = r"xformer\.(query_tokens$|clip_layernorm\.|qformer\..*\.crossattention\.)|temperature$|" + SCORES

LeftOver = dict[tuple[str, str], list[str]]
"""(source, why) -> its tensors; where nobody knows why and nobody allowed it, why is ""."""


@dataclass(frozen=True)
class Plan:
    """copied: our names and what makes them. fresh: our names that are initialised. left: what nothing is made of."""

    copied: Pieces
    fresh: list[str]
    left: LeftOver

    def initialises(self, *patterns: str) -> bool:
        """Whether any tensor whose name begins so is initialised."""
        return any(re.match("|".join(patterns), name) for name in self.fresh)


def make_plan(target: Target) -> Plan:
    """Where every tensor comes from.

    Raises:
        ValueError: in one line, naming what is missing, misshapen or left over though nobody allowed it.
    """
    copied: Pieces = {}
    misshapen: Pieces = {}
    for name, piece in our_pieces(target).items():
        if name in target.wanted:
            fits = piece.shape() == target.wanted[name].shape
            (copied if fits else misshapen)[name] = piece
    for piece in misshapen.values():
        piece.leave("of another shape")
    plan = Plan(copied, [name for name in target.wanted if name not in copied], left_over(target, copied))
    if errors := list(_errors(target, plan, misshapen)):
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        hint = _hint(target, plan)
        raise ValueError(f"{errors[0]}{more}; {hint}--allow NAME lets it be initialised or left over (* is anything)")
    return plan


def our_pieces(target: Target) -> Pieces:
    """Every piece by our names, without those that are not for this model by design."""
    sources, config = target.sources, target.config
    ours = translate(target.pieces, BLIP2)
    if not target.stage2:
        drop(ours, PROJECTION, "of stage 2 alone")
    else:
        drop(ours, f"{READS_TEXT}|{SCORES}|{WRITES_TEXT}", "of stage 1 alone")
        if not sources.llm_fits:
            drop(ours, PROJECTION, "made for another language model")
    if not sources.own_tower:
        drop(ours, TOWER, "the tower comes from --clip")
        tower = target.tower_pieces.items()
        ours |= {f"xformer.clip_encoder.tower.{name.removeprefix('vision_model.')}": piece for name, piece in tower}
    layers = r"xformer\.clip_encoder\.tower\.(?:.+\.)?layers?\.({})\."
    for number in layer_numbers(ours, layers.format(r"\d+")):
        if number > max(target.model.xformer.clip_encoder.read_layers):
            drop(ours, layers.format(number), "behind the layer that is read")
    if sources.mae is not None and config.has_mae:
        ours |= translate(as_they_are(sources.mae, current_mae_name), MAE)
        if not config.reconstruction:
            drop(ours, r"xformer\.mae_decoder\.", "the variant reconstructs nothing")
    elif sources.mae is not None:
        ours |= as_they_are(sources.mae, "xformer.mae_encoder.{}".format)
    if sources.llm is not None:
        ours |= as_they_are(sources.llm, "language_model.{}".format)
    return ours


def left_over(target: Target, copied: Pieces) -> LeftOver:
    used = {(id(piece.source), name) for piece in copied.values() for name in piece.names}
    tied = {name.removeprefix("language_model.") for name in target.model.all_tied_weights_keys}
    left: LeftOver = {}
    for source in target.sources.all():
        for name in {**source.tensors, **source.left}:
            if (id(source), name) not in used and not (source is target.sources.llm and name in tied):
                reason = source.left.get(name) or ("allowed" if allowed(name, target.settings.allow) else "")
                left.setdefault((source.label, reason), []).append(name)
    return left


def allowed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _errors(target: Target, plan: Plan, misshapen: Pieces) -> Iterable[str]:
    """What is wrong with a plan, most telling first."""
    allow, wanted = target.settings.allow, target.wanted
    for name, piece in misshapen.items():
        if not allowed(name, allow):
            has, needs = tuple(piece.shape()), tuple(wanted[name].shape)
            yield f"'{name}' is {has} in {piece.source.label}, the model needs {needs}"
    usual = [ALWAYS_FRESH]
    if target.sources.kind == "bert":
        usual.append(FRESH_BEHIND_BERT)
    if "language_projection.weight" not in target.pieces:
        usual.append(PROJECTION)
    for name in plan.fresh:
        if not (name in misshapen or re.match("|".join(usual), name) or allowed(name, allow)):
            yield f"no source has '{name}'"
    for (label, reason), names in plan.left.items():
        if not reason:
            yield from (f"{label} has '{name}', which has no place in the model" for name in names)


def _hint(target: Target, plan: Plan) -> str:
    parts = {part_of(name) for name in plan.fresh}
    if "mae_decoder" in parts:
        return "this MAE has no decoder, so nothing can be reconstructed: --variant no_reconstruction does without; "
    if "embeddings" in parts:
        return "a BLIP-2 of stage 2 has lost what stage 1 needs for texts, LAVIS's blip2_pretrained.pth has it; "
    if "language_projection" in parts and not target.sources.llm_fits:
        return "the Q-Former's projection was made for another language model; "
    return ""
