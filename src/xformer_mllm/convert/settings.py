"""What `xformer convert` is asked for; tyro turns the fields into flags and the texts under them into --help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Assemble a starting X-Former from published checkpoints: stage 1's, or with --llm stage 2's.

    A source is a hub id or a local folder of transformers, or one of LAVIS's .pth files. The command ends by comparing
    what it wrote with the sources, and leaves nothing behind if they differ.
    """

    qformer: str
    """BLIP-2 (Salesforce/blip2-opt-2.7b, Salesforce/blip2-itm-vit-g), LAVIS's blip2_pretrained*.pth, or a BERT."""
    output_dir: Path
    """The new model's folder; must not exist yet, or be empty."""
    mae: str | None = None
    """The MAE with its decoder (facebook/vit-mae-huge), or any vision tower for a variant without reconstruction."""
    llm: str | None = None
    """The frozen language model (facebook/opt-2.7b), for the start of stage 2; none: the start of stage 1."""
    clip: str | None = None
    """The CLIP tower, where it is not the Q-Former's own: LAVIS's eva_vit_g.pth, a BLIP-2, or any vision tower."""
    variant: str = "xformer"
    """Which model: a row of the paper's tables (xformer, qformer, concat, ...; see variants.py)."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the frozen parts; what is trained is float32."""
    qformer_tokenizer: str | None = None
    """A BERT tokenizer; none: that of --qformer where it is a BERT's, else bert-base-uncased."""
    allow: tuple[str, ...] = ()
    """Names (* stands for anything) of tensors that may be initialised or left over where that is an error."""
    seed: int = 0
    """Of what is initialised."""
