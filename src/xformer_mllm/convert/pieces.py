"""The sources' tensors by the names that a layout gives them; what has no use in the new model is noted in its source."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from xformer_mllm.convert.files import Source
from xformer_mllm.convert.layouts import BERT, EVA, LAVIS, Layout, current_bert_name


@dataclass(frozen=True)
class Piece:
    """One tensor of the new model: the source's tensors that make it, and how (most are one tensor as it is)."""

    source: Source
    names: tuple[str, ...]
    make: Callable[..., torch.Tensor] = lambda tensor: tensor

    def tensor(self) -> torch.Tensor:
        return self.make(*(self.source.read(name) for name in self.names))

    def shape(self) -> torch.Size:
        return self.make(*(self.source.tensors[name] for name in self.names)).shape

    def leave(self, reason: str) -> None:
        """Note that nothing is made of it, and why ("": nobody knows)."""
        self.source.left.update(dict.fromkeys(self.names, reason))


Pieces = dict[str, Piece]


def as_they_are(source: Source, rename: Callable[[str], str] = str) -> Pieces:
    return {rename(name): Piece(source, (name,)) for name in source.tensors}


def translate(pieces: Pieces, layout: Layout) -> Pieces:
    """Pieces by a layout's names -> by the next layout's."""
    result = {}
    for name, piece in pieces.items():
        found = [re.sub(f"^(?:{pattern})$", to, name) for pattern, to in layout.names if re.fullmatch(pattern, name)]
        result.update(dict.fromkeys(found, piece))
        if not found:
            piece.leave(next((why for pattern, why in layout.unused if re.fullmatch(pattern, name)), ""))
    return result


def drop(pieces: Pieces, pattern: str, reason: str) -> None:
    """Take out what is not for this model."""
    for name in [name for name in pieces if re.match(pattern, name)]:
        pieces.pop(name).leave(reason)


def blip2_pieces(source: Source, kind: str) -> Pieces:
    """Any --qformer or --clip source by transformers' BLIP-2 names; another tower's own behind `vision_model.`."""
    if kind == "blip-2":
        return as_they_are(source)
    if kind == "tower":
        return as_they_are(source, "vision_model.{}".format)
    rename = current_bert_name if kind == "bert" else str
    pieces = translate(as_they_are(source, rename), {"bert": BERT, "lavis": LAVIS, "eva": EVA}[kind])
    for layer in [name.removesuffix("q_bias") for name in pieces if name.endswith(".self_attn.q_bias")]:
        if f"{layer}v_bias" in pieces:
            names = pieces.pop(f"{layer}q_bias").names + pieces.pop(f"{layer}v_bias").names
            pieces[f"{layer}qkv.bias"] = Piece(source, names, _with_key_bias)
    return pieces


def _with_key_bias(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """EVA has biases for queries and values alone."""
    return torch.cat([query, torch.zeros_like(query), value])


def grown(piece: Piece, rows: int, deviation: float) -> Piece:
    """The same with rows for tokens that the source's vocabulary lacks, drawn from N(0, deviation)."""

    def make(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:]).normal_(0, deviation)])

    return Piece(piece.source, piece.names, make)
