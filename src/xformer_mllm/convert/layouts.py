"""The names of tensors in published checkpoints, and their translation.

A source's names -> transformers' names for BLIP-2 and the MAE -> this package's names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from xformer_mllm.convert.sources import Source

Names = tuple[tuple[str, str], ...]


class Layout(NamedTuple):
    """A checkpoint's names: (pattern, name in the next layout), and unused ones: (pattern, reason).

    A tensor is copied to every name whose pattern matches; one that matches neither is unknown.
    """

    names: Names
    unused: Names = ()


def _eva(prefix: str) -> Names:
    """LAVIS lavis/models/eva_vit.py -> Blip2VisionModel."""
    layer, to = prefix + r"blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."
    return (
        (prefix + "cls_token", "vision_model.embeddings.class_embedding"),
        (prefix + "pos_embed", "vision_model.embeddings.position_embedding"),
        (prefix + r"patch_embed\.proj\.(.+)", r"vision_model.embeddings.patch_embedding.\1"),
        (layer + r"norm([12])\.(.+)", to + r"layer_norm\2.\3"),
        (layer + r"attn\.(qkv\.weight|q_bias|v_bias)", to + r"self_attn.\2"),
        (layer + r"attn\.proj\.(.+)", to + r"self_attn.projection.\2"),
        (layer + r"mlp\.(.+)", to + r"mlp.\2"),
    )


TIED = (r".*cls\.predictions\.decoder\.(weight|bias)", "tied to the word embeddings and the bias")
POSITIONS = (r".*\.position_ids", "numbers of positions, not weights")

EVA = Layout(_eva(""), ((r"(norm|fc_norm|head)\..*", "after the layer that is read"),))

_LAVIS_LAYER = r"Qformer\.bert\.encoder\.layer\.(\d+)\."
LAVIS = Layout(  # LAVIS lavis/models/blip2_models/{blip2,Qformer,blip2_qformer,blip2_opt,blip2_t5}.py
    (
        *_eva(r"visual_encoder\."),
        (r"ln_vision\.(.+)", r"vision_model.post_layernorm.\1"),
        ("query_tokens", "query_tokens"),
        (r"Qformer\.bert\.embeddings\.LayerNorm\.(.+)", r"qformer.layernorm.\1"),
        (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
        (_LAVIS_LAYER + r"(attention|crossattention)\.self\.(.+)", r"qformer.encoder.layer.\1.\2.attention.\3"),
        (_LAVIS_LAYER + r"((?!.*\.self\.).+)", r"qformer.encoder.layer.\1.\2"),
        (r"Qformer\.cls\.predictions\.bias", "itg_bias"),
        (r"Qformer\.cls\.predictions\.transform\.(.+)", r"itg_transform.\1"),
        (r"(vision|text)_proj\.(.+)", r"\1_projection.\2"),
        (r"itm_head\.(.+)", r"itm_head.\1"),
        ("temp", "temperature"),
        (r"(?:opt|t5)_proj\.(.+)", r"language_projection.\1"),
    ),
    (TIED, POSITIONS, (r"(?:opt|t5)_model\..*", "the language model comes from --llm")),
)

_BERT_LAYER = r"(?:bert\.)?encoder\.layer\.(\d+)\."
BERT = Layout(  # as LAVIS starts from it: the queries' feed-forwards are copies of the text's, token types are dropped
    (
        (r"(?:bert\.)?embeddings\.(word|position)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
        (r"(?:bert\.)?embeddings\.LayerNorm\.(.+)", r"qformer.layernorm.\1"),
        (_BERT_LAYER + r"attention\.self\.(.+)", r"qformer.encoder.layer.\1.attention.attention.\2"),
        (_BERT_LAYER + r"attention\.output\.(.+)", r"qformer.encoder.layer.\1.attention.output.\2"),
        (_BERT_LAYER + r"(intermediate|output)\.(.+)", r"qformer.encoder.layer.\1.\2.\3"),
        (_BERT_LAYER + r"(intermediate|output)\.(.+)", r"qformer.encoder.layer.\1.\2_query.\3"),
        (r"cls\.predictions\.bias", "itg_bias"),
        (r"cls\.predictions\.transform\.(.+)", r"itg_transform.\1"),
    ),
    (
        (r"(?:bert\.)?embeddings\.token_type_embeddings\.weight", "the Q-Former has no token types"),
        (r"(?:bert\.)?pooler\..*|cls\.seq_relationship\..*", "the Q-Former has no next-sentence head"),
        TIED,
        POSITIONS,
    ),
)

BLIP2 = Layout(  # transformers' names, with our own for stage 1's generation head and temperature, which it lacks
    (
        (r"vision_model\.(.+)", r"xformer.clip_encoder.tower.\1"),
        (r"vision_model\.post_layernorm\.(.+)", r"xformer.clip_layernorm.\1"),  # it is LAVIS's trained ln_vision
        (r"(query_tokens|(?:qformer|embeddings)\..+)", r"xformer.\1"),
        (r"((?:vision_projection|text_projection|itm_head|itg_transform|language_projection)\..+)", r"\1"),
        (r"(itg_bias|temperature)", r"\1"),
    ),
    ((r"language_model\..*", "the language model comes from --llm"), POSITIONS),
)

MAE = Layout(((r"vit\.(.+)", r"xformer.mae_encoder.\1"), (r"decoder\.(.+)", r"xformer.mae_decoder.\1")))


def _mae_block(prefix: str, to: str) -> Names:
    """timm's `Block` -> ViTMAELayer."""
    layer, to = prefix + r"(\d+)\.", to + r".\1."
    return (
        (layer + r"norm1\.(.+)", to + r"layernorm_before.\2"),
        (layer + r"norm2\.(.+)", to + r"layernorm_after.\2"),
        (layer + r"attn\.proj\.(.+)", to + r"attention.o_proj.\2"),
        (layer + r"attn\.(qkv\..+)", to + r"attention.\2"),
        (layer + r"mlp\.(fc[12]\..+)", to + r"mlp.\2"),
    )


ORIGINAL_MAE = Layout(  # facebookresearch/mae models_mae.py -> ViTMAEForPreTraining
    (
        ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        (r"patch_embed\.proj\.(.+)", r"vit.embeddings.patch_embeddings.projection.\1"),
        *_mae_block(r"blocks\.", "vit.layers"),
        (r"norm\.(.+)", r"vit.layernorm.\1"),
        (r"(mask_token|decoder_pos_embed|decoder_(?:embed|norm|pred)\..+)", r"decoder.\1"),
        *_mae_block(r"decoder_blocks\.", "decoder.decoder_layers"),
    )
)


def current_mae_name(name: str) -> str:
    """Return the name that transformers gives a MAE's tensor in memory.

    The Hub has the names of transformers 4, and so has `save_pretrained` of transformers 5, except for the decoder's
    layers. A ViTMAEModel alone has no `vit.` prefix.
    """
    name = re.sub(r"^(?=(embeddings|encoder|layers|layernorm)\.)", "vit.", name)
    name = name.replace("vit.encoder.layer.", "vit.layers.").replace(".decoder_encoder.layer.", ".decoder_layers.")
    name = re.sub(r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attention.\1_proj.", name)
    name = name.replace(".attention.output.dense.", ".attention.o_proj.")
    return name.replace(".intermediate.dense.", ".mlp.fc1.").replace(".output.dense.", ".mlp.fc2.")


def current_bert_name(name: str) -> str:
    """Rename the layer norms of bert-base-uncased, which are named as in BERT's first release."""
    return name.replace(".LayerNorm.gamma", ".LayerNorm.weight").replace(".LayerNorm.beta", ".LayerNorm.bias")


@dataclass(frozen=True)
class Piece:
    """One tensor of the new model: the source tensors it is made from, and how (usually one, unchanged)."""

    source: Source
    names: tuple[str, ...]
    make: Callable[..., torch.Tensor] = lambda tensor: tensor

    def tensor(self) -> torch.Tensor:
        return self.make(*(self.source.tensors[name] for name in self.names))

    def shape(self) -> torch.Size:
        return self.make(*(self.source.tensors[name].to("meta") for name in self.names)).shape

    def leave(self, reason: str) -> None:
        """Record why it is not used ("" if unknown)."""
        self.source.left.update(dict.fromkeys(self.names, reason))


Pieces = dict[str, Piece]


def as_they_are(source: Source, rename: Callable[[str], str] = str) -> Pieces:
    return {rename(name): Piece(source, (name,)) for name in source.tensors}


def translate(pieces: Pieces, layout: Layout) -> Pieces:
    """Rename pieces from one layout to the next."""
    result = {}
    for name, piece in pieces.items():
        found = [re.sub(f"^(?:{pattern})$", to, name) for pattern, to in layout.names if re.fullmatch(pattern, name)]
        result.update(dict.fromkeys(found, piece))
        if not found:
            piece.leave(next((why for pattern, why in layout.unused if re.fullmatch(pattern, name)), ""))
    return result


def drop(pieces: Pieces, pattern: str, reason: str) -> None:
    """Remove the pieces whose names match, which this model does not use."""
    for name in [name for name in pieces if re.match(pattern, name)]:
        pieces.pop(name).leave(reason)


def blip2_pieces(source: Source) -> Pieces:
    """Return a --qformer or --clip source by BLIP-2's names; any other tower's own names follow `vision_model.`."""
    if source.kind == "blip-2":
        return as_they_are(source)
    if not source.kind:
        return as_they_are(source, "vision_model.{}".format)
    rename = current_bert_name if source.kind == "bert" else str
    pieces = translate(as_they_are(source, rename), {"bert": BERT, "LAVIS": LAVIS, "EVA-CLIP": EVA}[source.kind])
    # EVA has biases for queries and values only: the keys' is zero.
    for layer in [name.removesuffix("q_bias") for name in pieces if name.endswith(".self_attn.q_bias")]:
        if f"{layer}v_bias" in pieces:
            names = pieces.pop(f"{layer}q_bias").names + pieces.pop(f"{layer}v_bias").names
            pieces[f"{layer}qkv.bias"] = Piece(source, names, lambda q, v: torch.cat([q, torch.zeros_like(q), v]))
    return pieces


def mae_pieces(source: Source) -> Pieces:
    """Return a --mae source, a MAE, by the names that transformers gives its tensors in memory."""
    if source.kind == "vit_mae":
        return as_they_are(source, current_mae_name)
    pieces = translate(as_they_are(source), ORIGINAL_MAE)
    for name in [name for name in pieces if ".qkv." in name]:
        piece = pieces.pop(name)
        for number, letter in enumerate("qkv"):
            part = Piece(source, piece.names, partial(_third, number=number))
            pieces[name.replace(".qkv.", f".{letter}_proj.")] = part
    return pieces


def _third(tensor: torch.Tensor, number: int) -> torch.Tensor:
    return tensor.chunk(3)[number]


def grown(piece: Piece, rows: int, deviation: float) -> Piece:
    """Add rows for tokens that the source's vocabulary lacks, drawn from N(0, deviation)."""

    def make(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:]).normal_(0, deviation)])

    return Piece(piece.source, piece.names, make)
