"""`xformer convert`: published checkpoints -> a starting X-Former, and the proof that it still is its parents.

In the order of reading:

    sources    a hub id, a folder or a .pth file -> names, shapes, and tensors one at a time
    names      each layout's names -> transformers' names of BLIP-2 -> ours
    target     the configuration, processor and (empty) model that the sources make
    plan       for each tensor of the model where it comes from; what is initialised; what is left over
    writing    tensor by tensor into shards: never a second copy of a part in memory
    checks     the written model against the sources, run by their own code: logits, scores, reconstruction loss

A tensor that is missing, left over or of another shape is an error, unless it is so by design (said in the printed
table) or allowed by name.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTMAEForPreTraining,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .data.json_files import read_json, write_whole
from .language_models import language_model_dir
from .model.configuration_xformer import XFormerConfig
from .model.modeling_xformer import (
    FROZEN,
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    XFormerForPreTraining,
    without_dropout,
)
from .model.processing_xformer import XFormerProcessor, image_processor
from .model.vision_encoders import build_tower, scaled, tower_tokens
from .variants import variant_config, with_second_encoder

SHARD_BYTES = 2 * 1024**3
# Of the largest difference, relative to the largest value.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3, "float16": 1e-3}
EVA_HEADS = 16  # of LAVIS's EVA-CLIP ViT-g (eva_vit.py create_eva_vit_g); no shape tells it
BERT_HEAD_WIDTH = 64
BERT_SETTINGS = (  # which a Q-Former has, too
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps"),
)
LN_VISION_EPSILON = 1e-5  # LAVIS blip2.py; transformers, whose post_layernorm plays its part, has 1e-6
CAPTION = "a photo of a red circle"
QUESTION = "Question: what is in the picture? Answer:"


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


def convert(config: ConvertConfig) -> Path:
    """Convert, verify, and return the new model's folder.

    Raises:
        ValueError, OSError: in one line, for a source that cannot be read or does not fit, and for a difference.
    """
    folder = config.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: there is something already; name another --output-dir or remove it")
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers' own reports of what it loaded: ours is complete
    try:
        target = build_target(config, open_sources(config))
        plan = make_plan(target)
        table = summary(plan, target)
        print(show_summary(table))
        partial.mkdir(parents=True)
        write_model(partial, plan, target)
        checks = verify(partial, plan, target)
        print(f"\n{show_checks(checks)}")
        for check in checks:
            if not check.difference <= check.tolerance:  # nan is a difference, too
                raise ValueError(
                    f"{check.what}: the new model is {check.difference:.1e} away from {check.against} (of the largest "
                    f"value; at most {check.tolerance:.0e}), so it is not kept; were the sources made for each other?"
                )
        write_whole(partial / "conversion.json", json.dumps(record(target, table, checks), indent=2) + "\n")
        os.replace(partial, folder)
    finally:
        logging.set_verbosity(verbosity)
        shutil.rmtree(partial, ignore_errors=True)
    print(f"\n{folder}: {type(target.model).__name__}")
    return folder


# -- sources ---------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A checkpoint.

    label: as the user named it. tensors: shapes and dtypes, on the meta device. read: one tensor by its name. config: None
    for a .pth file. left: names that have no use in the new model, and why ("": nobody knows).
    """

    label: str
    tensors: dict[str, torch.Tensor]
    read: Callable[[str], torch.Tensor]
    folder: Any = None
    config: Any = None
    left: dict[str, str] = field(default_factory=dict)


@dataclass
class Sources:
    """Those of a conversion. kind: of --qformer, "blip-2", "bert" or "lavis"; tower_kind: "blip-2", "eva", "tower"."""

    qformer: Source
    kind: str
    tower: Source
    tower_kind: str
    mae: Source | None = None
    llm: Source | None = None

    @property
    def own_tower(self) -> bool:
        """Whether the Q-Former's source has its own tower."""
        return self.tower is self.qformer

    def all(self) -> list[Source]:
        found = [self.qformer, None if self.own_tower else self.tower, self.mae, self.llm]
        return [source for source in found if source is not None]


def open_sources(config: ConvertConfig) -> Sources:
    """Open every checkpoint that the settings name. Raises as `convert`."""
    if config.variant == "random_mae":
        raise ValueError("variant random_mae has a MAE that was never trained: there is nothing to convert for it")
    second = config.variant not in ("qformer", "clip_shallow")
    if second and config.mae is None:
        raise ValueError(f"variant {config.variant} has a second encoder: name it with --mae (facebook/vit-mae-huge)")
    if not second and config.mae is not None:
        raise ValueError(f"variant {config.variant} has no second encoder: leave --mae out")
    qformer = open_source(config.qformer)
    if qformer.config is None:
        kind = "lavis" if any(name.startswith("Qformer.") for name in qformer.tensors) else "a .pth without Q-Former"
    else:
        kind = qformer.config.model_type
    if kind not in ("blip-2", "bert", "lavis"):
        raise ValueError(
            f"{config.qformer}: {kind}; --qformer takes a BLIP-2 or a BERT of transformers, or LAVIS's blip2_pretrained*.pth"
        )
    sources = Sources(qformer, kind, *_open_tower(config, qformer, kind))
    if config.mae is not None:
        sources.mae = open_mae(config.mae, config.dtype)
    if config.llm is not None:
        sources.llm = open_language_model(config.llm, config.dtype)
    return sources


def _open_tower(config: ConvertConfig, qformer: Source, kind: str) -> tuple[Source, str]:
    """The checkpoint that has the CLIP tower, --clip's or the Q-Former's own, and its kind."""
    if config.clip is None:
        if kind == "blip-2":
            return qformer, "blip-2"
        if "visual_encoder.cls_token" in qformer.tensors:
            return qformer, "eva"
        raise ValueError(
            f"{config.qformer}: has no CLIP tower; name it with --clip (for LAVIS's files its eva_vit_g.pth, or "
            "Salesforce/blip2-opt-2.7b)"
        )
    folder = local(config.clip)
    if folder.is_file():
        source = open_source(config.clip)
        if "blocks.0.attn.qkv.weight" not in source.tensors:
            raise ValueError(f"{config.clip}: not LAVIS's EVA-CLIP (no tensor 'blocks.0.attn.qkv.weight')")
        return source, "eva"
    if read_config(folder, config.clip).model_type == "blip-2":
        return open_source(config.clip), "blip-2"
    return open_tower(config.clip, config.dtype), "tower"


def local(name: str, weights: bool = True) -> Path:
    """A file or folder as it is; a hub id downloaded (weights as safetensors where there are any) -> its folder."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name}: no such file or folder")
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"]))
        if weights:
            snapshot_download(name, allow_patterns=["model*.safetensors"])
            if not list(folder.glob("model*.safetensors")):
                snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"{name}: no such file or folder, and not to be had from the hub ({_first_line(error)}); download it where "
            "there is a network and give its folder"
        ) from None
    return folder


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]


def read_config(folder: Path, label: str) -> PreTrainedConfig:
    """The configuration in a folder of transformers. Raises ValueError if there is none, or of an unknown kind."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{label}: not a checkpoint of transformers (no config.json in it)")
    kind = read_json(folder / "config.json").get("model_type")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError):
        raise ValueError(f"{label}: an architecture that transformers does not know ('{kind}')") from None


def open_source(name: str) -> Source:
    """A checkpoint whose tensors are read one at a time. Raises as `convert`."""
    path = local(name)
    if path.is_file():
        return _pickled_source(name, [path])
    config = read_config(path, name)
    if files := sorted(path.glob("model*.safetensors")):
        handles = [_open_safetensors(file) for file in files]
        where = {key: handle for handle in handles for key in handle.keys()}  # noqa: SIM118
        meta = {key: _meta(handle.get_slice(key)) for key, handle in where.items()}
        return Source(name, meta, lambda key: where[key].get_tensor(key), path, config)
    if files := sorted(path.glob("pytorch_model*.bin")):
        return _pickled_source(name, files, path, config)
    raise ValueError(f"{name}: no weights in it (model.safetensors or pytorch_model.bin)")


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or cut short ({error}); download it again") from None


def _meta(part: Any) -> torch.Tensor:
    """What a safetensors file says of a tensor, on the meta device; of its dtype only whether it is a count."""
    floating = part.get_dtype().startswith(("F", "BF"))
    return torch.empty(part.get_shape(), dtype=torch.float32 if floating else torch.int64, device="meta")


def _pickled_source(name: str, files: Sequence[Path], folder: Path | None = None, config: Any = None) -> Source:
    tensors = {key: tensor for file in files for key, tensor in read_pickled(file).items()}
    return Source(name, {key: t.to("meta") for key, t in tensors.items()}, tensors.__getitem__, folder, config)


def read_pickled(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of torch.save, where nothing but tensors and plain containers is unpickled.

    LAVIS puts it under "model". The tensors stay on disk until they are used, where the file's format allows it.
    """
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch before 1.6 wrote another format, which cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling foreign bytes raises anything
        raise ValueError(f"{file}: not a checkpoint that can be read safely ({_first_line(error)})") from None
    state = content.get("model", content) if isinstance(content, dict) else None
    tensors = {key: t for key, t in state.items() if isinstance(t, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{file}: not a checkpoint (no tensors in it)")
    return tensors


def open_mae(name: str, dtype: str) -> Source:
    """The second encoder: a MAE, read tensor by tensor, or any other vision tower."""
    folder = local(name)
    if folder.is_file():
        raise ValueError(f"{name}: --mae takes a hub id or a folder of transformers (facebook/vit-mae-huge)")
    if read_config(folder, name).model_type == "vit_mae":
        return open_source(name)
    return open_tower(name, dtype)


def open_tower(name: str, dtype: str) -> Source:
    """Any vision tower that AutoModel knows, alone or within a CLIP or SigLIP, loaded by transformers."""
    folder = local(name)
    config = read_config(folder, name)
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "patch_size"):
        raise ValueError(f"{name}: a {config.model_type} is no vision tower")
    try:
        with torch.device("meta"):
            kind = type(build_tower(vision))
    except ValueError:
        raise ValueError(f"{name}: a {config.model_type} has no vision tower that transformers can build") from None
    source = _loaded(name, folder, kind, vision, dtype)
    if vision is not config:
        for key in source.left:
            if re.match(r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$", key):
                source.left[key] = "outside of the vision tower"
    return source


def open_language_model(name: str, dtype: str) -> Source:
    """A frozen causal language model, without dropout, loaded by transformers: its layout may be any."""
    folder = local(str(language_model_dir(name)))
    config = read_config(folder, name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: a {config.model_type} is no causal language model")
    return _loaded(name, folder, AutoModelForCausalLM, without_dropout(config), dtype)


def _loaded(name: str, folder: Path, kind: Any, config: Any, dtype: str) -> Source:
    """A checkpoint by transformers' own loader; what it found missing or misshapen is so in the source, too."""
    try:
        model, report = kind.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name}: {_first_line(error)}") from None
    state = model.state_dict()
    tensors = {key: tensor.to("meta") for key, tensor in state.items() if key not in report["missing_keys"]}
    tensors |= {key: torch.empty(shape, device="meta") for key, shape, _ in report["mismatched_keys"]}
    return Source(name, tensors, state.__getitem__, folder, model.config, dict.fromkeys(report["unexpected_keys"], ""))


# -- names -----------------------------------------------------------------------------------------------------------


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


Pieces = dict[str, Piece]


class Layout(NamedTuple):
    """How a checkpoint names its tensors: (pattern, name in the next layout), and (pattern, why it has no use).

    A tensor goes to every name whose pattern fits; none and no reason: it is unknown.
    """

    names: tuple[tuple[str, str], ...]
    unused: tuple[tuple[str, str], ...] = ()


def _eva(prefix: str) -> tuple[tuple[str, str], ...]:
    """LAVIS lavis/models/eva_vit.py -> Blip2VisionModel."""
    layer = prefix + r"blocks\.(\d+)\."
    to = r"vision_model.encoder.layers.\1."
    return (
        (prefix + "cls_token", "vision_model.embeddings.class_embedding"),
        (prefix + "pos_embed", "vision_model.embeddings.position_embedding"),
        (prefix + r"patch_embed\.proj\.(weight|bias)", r"vision_model.embeddings.patch_embedding.\1"),
        (layer + r"norm([12])\.(weight|bias)", to + r"layer_norm\2.\3"),
        (layer + r"attn\.(qkv\.weight|q_bias|v_bias)", to + r"self_attn.\2"),
        (layer + r"attn\.proj\.(weight|bias)", to + r"self_attn.projection.\2"),
        (layer + r"mlp\.(fc[12])\.(weight|bias)", to + r"mlp.\2.\3"),
    )


EVA = Layout(_eva(""), ((r"(norm|fc_norm|head)\..*", "behind the layer that is read"),))

_LAVIS_LAYER = r"Qformer\.bert\.encoder\.layer\.(\d+)\."
LAVIS = Layout(  # LAVIS lavis/models/blip2_models/{blip2,Qformer,blip2_qformer,blip2_opt}.py
    (
        *_eva(r"visual_encoder\."),
        (r"ln_vision\.(weight|bias)", r"vision_model.post_layernorm.\1"),
        ("query_tokens", "query_tokens"),
        (r"Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)", r"qformer.layernorm.\1"),
        (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
        (
            _LAVIS_LAYER + r"(attention|crossattention)\.self\.(query|key|value)\.(weight|bias)",
            r"qformer.encoder.layer.\1.\2.attention.\3.\4",
        ),
        (
            _LAVIS_LAYER + r"((?:(?:attention|crossattention)\.output|intermediate|output|intermediate_query"
            r"|output_query)\.(?:dense|LayerNorm)\.(?:weight|bias))",
            r"qformer.encoder.layer.\1.\2",
        ),
        (r"Qformer\.cls\.predictions\.bias", "itg_bias"),
        (r"Qformer\.cls\.predictions\.transform\.(.+)", r"itg_transform.\1"),
        (r"vision_proj\.(.+)", r"vision_projection.\1"),
        (r"text_proj\.(.+)", r"text_projection.\1"),
        (r"itm_head\.(.+)", r"itm_head.\1"),
        ("temp", "temperature"),
        (r"opt_proj\.(.+)", r"language_projection.\1"),
    ),
    (
        (r"Qformer\.cls\.predictions\.decoder\.(weight|bias)", "tied to the word embeddings and the bias"),
        (r".*\.position_ids", "numbers of positions, not weights"),
        (r"opt_model\..*", "the language model comes from --llm"),
    ),
)

_BERT_LAYER = r"(?:bert\.)?encoder\.layer\.(\d+)\."
BERT = Layout(  # as LAVIS starts from it: the queries' feed-forwards are copies of the text's, token types are dropped
    (
        (r"(?:bert\.)?embeddings\.(word|position)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
        (r"(?:bert\.)?embeddings\.LayerNorm\.(weight|bias)", r"qformer.layernorm.\1"),
        (
            _BERT_LAYER + r"attention\.self\.(query|key|value)\.(weight|bias)",
            r"qformer.encoder.layer.\1.attention.attention.\2.\3",
        ),
        (_BERT_LAYER + r"attention\.output\.(.+)", r"qformer.encoder.layer.\1.attention.output.\2"),
        (_BERT_LAYER + r"(intermediate|output)\.(.+)", r"qformer.encoder.layer.\1.\2.\3"),
        (_BERT_LAYER + r"(intermediate|output)\.(.+)", r"qformer.encoder.layer.\1.\2_query.\3"),
        (r"cls\.predictions\.bias", "itg_bias"),
        (r"cls\.predictions\.transform\.(.+)", r"itg_transform.\1"),
    ),
    (
        (r"(?:bert\.)?embeddings\.token_type_embeddings\.weight", "the Q-Former has no token types"),
        (r"(?:bert\.)?pooler\..*|cls\.seq_relationship\..*", "the Q-Former has no next-sentence head"),
        (r"cls\.predictions\.decoder\.(weight|bias)", "tied to the word embeddings and the bias"),
        (r".*\.position_ids", "numbers of positions, not weights"),
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
    (
        (r"language_model\..*", "the language model comes from --llm"),
        (r".*\.position_ids", "numbers of positions, not weights"),
    ),
)

MAE = Layout(
    ((r"vit\.(.+)", r"xformer.mae_encoder.\1"), (r"decoder\.(.+)", r"xformer.mae_decoder.\1")),
)


def current_mae_name(name: str) -> str:
    """A tensor of a MAE -> the name that transformers gives it in memory.

    On the hub are the names of transformers 4; `save_pretrained` of transformers 5 writes those, too, but of the decoder's
    layers another one. A ViTMAEModel alone has no `vit.` in front.
    """
    name = re.sub(r"^(?=(embeddings|encoder|layers|layernorm)\.)", "vit.", name)
    name = name.replace("vit.encoder.layer.", "vit.layers.").replace(".decoder_encoder.layer.", ".decoder_layers.")
    name = re.sub(r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attention.\1_proj.", name)
    name = name.replace(".attention.output.dense.", ".attention.o_proj.")
    return name.replace(".intermediate.dense.", ".mlp.fc1.").replace(".output.dense.", ".mlp.fc2.")


def current_bert_name(name: str) -> str:
    """bert-base-uncased still has the names of BERT's first release for its layer norms."""
    return name.replace(".LayerNorm.gamma", ".LayerNorm.weight").replace(".LayerNorm.beta", ".LayerNorm.bias")


def as_they_are(source: Source, rename: Callable[[str], str] = str) -> Pieces:
    return {rename(name): Piece(source, (name,)) for name in source.tensors}


def translate(pieces: Pieces, layout: Layout) -> Pieces:
    """Pieces by a layout's names -> by the next layout's. What has no use there is noted in its source's `left`."""
    result = {}
    for name, piece in pieces.items():
        found = [re.sub(f"^(?:{pattern})$", to, name) for pattern, to in layout.names if re.fullmatch(pattern, name)]
        result.update(dict.fromkeys(found, piece))
        if not found:
            reason = next((why for pattern, why in layout.unused if re.fullmatch(pattern, name)), "")
            piece.source.left.update(dict.fromkeys(piece.names, reason))
    return result


def drop(pieces: Pieces, pattern: str, reason: str) -> None:
    """Take out what is not for this model, and note why in its source's `left`."""
    for name in [name for name in pieces if re.match(pattern, name)]:
        piece = pieces.pop(name)
        piece.source.left.update(dict.fromkeys(piece.names, reason))


def blip2_pieces(source: Source, kind: str) -> Pieces:
    """Any --qformer or --clip source by transformers' BLIP-2 names; another tower's own behind `vision_model.`."""
    if kind == "blip-2":
        return as_they_are(source)
    if kind == "tower":
        return {f"vision_model.{name}": piece for name, piece in as_they_are(source).items()}
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


# -- target ----------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """What is made, and of what.

    model: on the meta device; pieces, tower_pieces: the Q-Former's and the tower's, by transformers' names of BLIP-2;
    wanted: our names of all that is saved, on the meta device in the dtype that it is saved in.
    """

    settings: ConvertConfig
    sources: Sources
    model: PreTrainedModel
    processor: XFormerProcessor
    pieces: Pieces
    tower_pieces: Pieces
    wanted: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        tied = self.model.all_tied_weights_keys
        self.wanted = {}
        for name, tensor in self.model.state_dict().items():
            if name not in tied:
                dtype = self.dtype if set(FROZEN) & set(name.split(".")[:2]) else torch.float32
                self.wanted[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen parts."""
        return getattr(torch, self.settings.dtype)

    @property
    def config(self) -> XFormerConfig:
        return self.model.config

    @property
    def stage2(self) -> bool:
        return self.sources.llm is not None


def build_target(settings: ConvertConfig, sources: Sources) -> Target:
    """The configuration, processor and empty model that the sources make. Raises ValueError where they cannot."""
    pieces = tower_pieces = blip2_pieces(sources.qformer, sources.kind)
    if not sources.own_tower:
        tower_pieces = blip2_pieces(sources.tower, sources.tower_kind)
        drop(tower_pieces, r"(?!vision_model\.)", "only the tower is taken from --clip")
    tokenizer = qformer_tokenizer(settings, sources)
    config = build_config(settings, sources, pieces, tower_pieces, tokenizer)
    kind: Any = XFormerForPreTraining
    llm_tokenizer, queries = tokenizer, None
    if sources.llm is not None:
        kind = XFormerForConditionalGeneration
        llm_tokenizer, queries = llm_tokenizer_of(sources.llm), config.num_query_tokens
    processor = XFormerProcessor(image_processor(config.clip_config.image_size), llm_tokenizer, tokenizer, queries)
    if sources.llm is not None:
        config.image_token_index = processor.image_token_id
    with torch.device("meta"):
        model = kind(config)
    if sources.kind == "bert":  # [DEC] is new to its vocabulary
        for name, deviation in (("embeddings.word_embeddings.weight", config.initializer_range), ("itg_bias", 0.0)):
            if name in pieces:
                pieces[name] = grown(pieces[name], config.qformer_config.vocab_size, deviation)
    return Target(settings, sources, model, processor, pieces, tower_pieces)


def build_config(
    settings: ConvertConfig, sources: Sources, pieces: Pieces, tower_pieces: Pieces, tokenizer: PreTrainedTokenizerBase
) -> XFormerConfig:
    """The variant of what the sources' configurations, or shapes where they have none, say."""
    vision, layer = vision_config(sources, tower_pieces)
    qformer = qformer_config(sources, pieces, tokenizer, vision.hidden_size)
    qformer.use_qformer_text_input = sources.llm is None
    mean, deviation = pixel_statistics(sources.tower.folder)
    base = XFormerConfig(
        clip_config=vision,
        clip_feature_layer=layer,
        clip_mean=mean,
        clip_std=deviation,
        qformer_config=qformer,
        text_config=None if sources.llm is None else sources.llm.config,
        num_query_tokens=_size(pieces, "query_tokens", 1) or 32,
        image_text_hidden_size=_size(pieces, "vision_projection.weight") or 256,
        text_start_token_id=tokenizer.bos_token_id,
        fusion="none",
        reconstruction=False,
    )
    if sources.mae is not None:
        base = with_second_encoder(base, sources.mae.config)
        mean, deviation = pixel_statistics(sources.mae.folder)
        base.mae_mean, base.mae_std = mean or base.mae_mean, deviation or base.mae_std
    config = variant_config(settings.variant, base)
    for part in (config, config.clip_config, config.mae_config, config.text_config):
        if part is not None:
            part.dtype = settings.dtype
    config.qformer_config.dtype = "float32"
    return config


def _size(pieces: Pieces, name: str, dim: int = 0) -> int | None:
    return pieces[name].shape()[dim] if name in pieces else None


def _numbers(pieces: Pieces, pattern: str) -> list[int]:
    """The layers' numbers, in the first group of `pattern`."""
    return sorted({int(match[1]) for name in pieces if (match := re.match(pattern, name))})


def vision_config(sources: Sources, pieces: Pieces) -> tuple[Any, int]:
    """The tower's configuration, and which of its layers gives C: the penultimate, -1 where the last is cut off."""
    if sources.tower_kind == "blip-2":
        return sources.tower.config.vision_config, -1
    if sources.tower_kind == "tower":
        return sources.tower.config, -2
    patches = "vision_model.embeddings.patch_embedding.weight"
    width, patch = _size(pieces, patches), _size(pieces, patches, 3)
    positions = _size(pieces, "vision_model.embeddings.position_embedding", 1)
    inner = _size(pieces, "vision_model.encoder.layers.0.mlp.fc1.weight")
    layers = len(_numbers(pieces, r"vision_model\.encoder\.layers\.(\d+)\."))
    if not width or not patch or not positions or not inner:
        raise ValueError(
            f"{sources.tower.label}: not a whole EVA-CLIP (patches, positions or the first block are missing)"
        )
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers
        if sources.own_tower
        else layers - 1,  # eva_vit_g.pth has 40; LAVIS builds and saves 39
        num_attention_heads=EVA_HEADS,
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return config, -1


def qformer_config(
    sources: Sources, pieces: Pieces, tokenizer: PreTrainedTokenizerBase, clip_width: int
) -> Blip2QFormerConfig:
    """The Q-Former's configuration: the source's, or for LAVIS, which saves none, read off the shapes."""
    source, words = sources.qformer, _size(pieces, "embeddings.word_embeddings.weight")
    vocabulary = words if words and sources.kind != "bert" else len(tokenizer)
    if vocabulary < len(tokenizer):
        raise ValueError(
            f"{source.label}: knows {words} tokens, but the Q-Former's tokenizer has {len(tokenizer)}; name its own with "
            "--qformer-tokenizer"
        )
    fields: dict[str, Any]
    if sources.kind == "blip-2":
        fields = source.config.qformer_config.to_dict()
        del fields["model_type"]
    elif sources.kind == "bert":
        fields = {name: getattr(source.config, name) for name in BERT_SETTINGS}
    else:
        layers = _numbers(pieces, r"qformer\.encoder\.layer\.(\d+)\.")
        crossing = _numbers(pieces, r"qformer\.encoder\.layer\.(\d+)\.crossattention")
        width = _size(pieces, "qformer.layernorm.weight")
        if not width or not crossing:
            raise ValueError(f"{source.label}: not a whole Q-Former (no layers with cross-attention in it)")
        fields = {
            "hidden_size": width,
            "num_hidden_layers": len(layers),
            "num_attention_heads": max(1, width // BERT_HEAD_WIDTH),
            "intermediate_size": _size(pieces, "qformer.encoder.layer.0.intermediate_query.dense.weight"),
            "cross_attention_frequency": crossing[1] - crossing[0] if len(crossing) > 1 else 2,
            "max_position_embeddings": _size(pieces, "embeddings.position_embeddings.weight") or 512,
        }
    return Blip2QFormerConfig(**fields | {"encoder_hidden_size": clip_width, "vocab_size": vocabulary})


def qformer_tokenizer(settings: ConvertConfig, sources: Sources) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with [DEC], which starts a text that is to be generated (LAVIS blip2.py `init_tokenizer`)."""
    name = settings.qformer_tokenizer or (settings.qformer if sources.kind == "bert" else "bert-base-uncased")
    tokenizer = load_tokenizer(name)
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(f"{name}: not a BERT's tokenizer (no [CLS], [SEP]); name one with --qformer-tokenizer")
    if tokenizer.bos_token_id is None:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def llm_tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(source.folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    folder = local(name, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: no tokenizer could be read from it ({_first_line(error)})") from None


def pixel_statistics(folder: Path | None) -> tuple[list | None, list | None]:
    """Mean and deviation that a checkpoint's image processor states; None for the default of its kind of tower."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if folder is not None and (folder / name).is_file():
            stated = read_json(folder / name)
            stated = stated.get("image_processor", stated)
            return stated.get("image_mean"), stated.get("image_std")
    return None, None


# -- plan ------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """copied: our names and what makes them. fresh: our names that are initialised. left: (source, why) -> its names."""

    copied: Pieces
    fresh: list[str]
    left: dict[tuple[str, str], list[str]]


_LAYER = r"encoder\.layer\.\d+\."
READS_IMAGES = (
    r"xformer\.(query_tokens$|clip_layernorm\.|qformer\.layernorm\.)"
    rf"|xformer\.qformer\.{_LAYER}(attention|crossattention|intermediate_query|output_query)\."
)
READS_TEXT = rf"xformer\.(embeddings|qformer\.{_LAYER}(intermediate|output))\."
SCORES = r"(vision_projection|text_projection|itm_head)\."
WRITES_TEXT = r"itg_|temperature$"

# What a source of its kind never has: initialised without asking.
ALWAYS_FRESH = r"xformer\.(fusion|clip_encoder\.tower\.post_layernorm)\."  # the latter (a BLIP-2 tower's) is never run
FRESH_BEHIND_BERT = r"xformer\.(query_tokens$|clip_layernorm\.|qformer\..*\.crossattention\.)|temperature$|" + SCORES


def make_plan(target: Target) -> Plan:
    """Where every tensor comes from.

    Raises:
        ValueError: in one line, naming what is missing, misshapen or left over though nobody allowed it.
    """
    ours, wanted, allow = our_pieces(target), target.wanted, target.settings.allow
    fits = {name: piece for name, piece in ours.items() if name in wanted and piece.shape() == wanted[name].shape}
    misshapen = {name: piece for name, piece in ours.items() if name in wanted and name not in fits}
    fresh = [name for name in wanted if name not in fits]
    for piece in misshapen.values():
        piece.source.left.update(dict.fromkeys(piece.names, "of another shape"))
    left = left_over(target, fits)

    usual = [ALWAYS_FRESH]
    if target.sources.kind == "bert":
        usual.append(FRESH_BEHIND_BERT)
    if "language_projection.weight" not in target.pieces:
        usual.append(r"language_projection\.")
    errors = [
        f"'{name}' is {tuple(piece.shape())} in {piece.source.label}, the model needs {tuple(wanted[name].shape)}"
        for name, piece in misshapen.items()
        if not allowed(name, allow)
    ]
    errors += [
        f"no source has '{name}'"
        for name in fresh
        if not (name in misshapen or re.match("|".join(usual), name) or allowed(name, allow))
    ]
    errors += [
        f"{label} has '{name}', which has no place in the model"
        for (label, reason), names in left.items()
        for name in names
        if not reason
    ]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ValueError(
            f"{errors[0]}{more}; {_hint(target, fresh)}--allow NAME lets it be initialised or left over (* is anything)"
        )
    return Plan(fits, fresh, left)


def allowed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _hint(target: Target, fresh: Iterable[str]) -> str:
    parts = {part_of(name) for name in fresh}
    if "mae_decoder" in parts:
        return "this MAE has no decoder, so nothing can be reconstructed: --variant no_reconstruction does without; "
    if "embeddings" in parts:
        return "a BLIP-2 of stage 2 has lost what stage 1 needs for texts, LAVIS's blip2_pretrained.pth has it; "
    if "language_projection" in parts and not same_language_model(target.sources):
        return "the Q-Former's projection was made for another language model; "
    return ""


def our_pieces(target: Target) -> Pieces:
    """Every piece by our names, without those that are not for this model by design."""
    sources, config = target.sources, target.config
    ours = translate(target.pieces, BLIP2)
    if target.stage2:
        drop(ours, f"{READS_TEXT}|{SCORES}|{WRITES_TEXT}", "of stage 1 alone")
        if not same_language_model(sources):
            drop(ours, r"language_projection\.", "made for another language model")
    else:
        drop(ours, r"language_projection\.", "of stage 2 alone")
    if not sources.own_tower:
        drop(ours, r"xformer\.clip_encoder\.(?!tower\.post_layernorm)", "the tower comes from --clip")
        tower = target.tower_pieces.items()
        ours |= {f"xformer.clip_encoder.tower.{name.removeprefix('vision_model.')}": piece for name, piece in tower}
    layers = r"xformer\.clip_encoder\.tower\.(?:.+\.)?layers?\.({})\."
    for number in _numbers(ours, layers.format(r"\d+")):
        if number > max(target.model.xformer.clip_encoder.read_layers):
            drop(ours, layers.format(number), "behind the layer that is read")
    if sources.mae is not None and config.has_mae:
        ours |= translate(as_they_are(sources.mae, current_mae_name), MAE)
        if not config.reconstruction:
            drop(ours, r"xformer\.mae_decoder\.", "the variant reconstructs nothing")
    elif sources.mae is not None:
        ours |= {f"xformer.mae_encoder.{name}": piece for name, piece in as_they_are(sources.mae).items()}
    if sources.llm is not None:
        ours |= {f"language_model.{name}": piece for name, piece in as_they_are(sources.llm).items()}
    return ours


def same_language_model(sources: Sources) -> bool:
    """Whether --llm is what a BLIP-2's projection was trained for, as far as its configuration can tell."""
    if sources.kind != "blip-2" or sources.llm is None:
        return True
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
    theirs, ours = sources.qformer.config.text_config, sources.llm.config
    return all(getattr(theirs, size, None) == getattr(ours, size, None) for size in sizes)


def left_over(target: Target, copied: Pieces) -> dict[tuple[str, str], list[str]]:
    """(source, why) -> its tensors that nothing is made of; where nobody knows why and nobody allowed it, why is ""."""
    used = {(id(piece.source), name) for piece in copied.values() for name in piece.names}
    tied = {name.removeprefix("language_model.") for name in target.model.all_tied_weights_keys}
    left: dict[tuple[str, str], list[str]] = {}
    for source in target.sources.all():
        for name in {**source.tensors, **source.left}:
            if (id(source), name) not in used and not (source is target.sources.llm and name in tied):
                reason = source.left.get(name) or ("allowed" if allowed(name, target.settings.allow) else "")
                left.setdefault((source.label, reason), []).append(name)
    return left


def summary(plan: Plan, target: Target) -> dict[str, list[dict]]:
    """The table as plain data: `parts` (what is made, from where) and `left` (what of the sources is not used)."""
    rows: dict[tuple[str, str, str], dict] = {}
    for name, tensor in target.wanted.items():
        origin = plan.copied[name].source.label if name in plan.copied else "initialised"
        dtype = str(tensor.dtype).removeprefix("torch.")
        empty = {"part": part_of(name), "from": origin, "tensors": 0, "parameters": 0, "dtype": dtype}
        row = rows.setdefault((part_of(name), origin, dtype), empty)
        row["tensors"] += 1
        row["parameters"] += tensor.numel()
    left = [
        {"source": label, "tensors": len(names), "why": reason, "first": names[0]}
        for (label, reason), names in plan.left.items()
    ]
    return {"parts": list(rows.values()), "left": left}


def part_of(name: str) -> str:
    """The group of the table that one of our names is in."""
    name = name.removeprefix("xformer.")
    if re.match(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.", name):
        return "qformer (text)"
    return name.split(".")[0]


def show_summary(table: dict[str, list[dict]]) -> str:
    parts = table["parts"]
    total = {"part": "total", "from": "", "dtype": ""}
    total |= {count: sum(row[count] for row in parts) for count in ("tensors", "parameters")}
    columns: tuple[str, ...] = ("part", "from", "tensors", "parameters", "dtype")
    text = _table(columns, [[_cell(row[column]) for column in columns] for row in [*parts, total]])
    if table["left"]:
        columns = ("source", "tensors", "why", "first")
        rows = [[_cell(row[column]) for column in columns] for row in table["left"]]
        text += "\n\n" + _table(("left over in", "tensors", "why", "the first of them"), rows)
    return text


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; numbers to the right."""
    lines = [list(head), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    number = [bool(rows) and all(row[column][:1].isdigit() for row in rows) for column in range(len(head))]
    shown = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, number, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join(shown)


# -- writing ---------------------------------------------------------------------------------------------------------


def write_model(folder: Path, plan: Plan, target: Target) -> None:
    """Configuration, processor and weights, in safetensors shards with an index where there is more than one.

    The language model, which is in memory, is let go of.
    """
    config, model = target.config, target.model
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    target.processor.save_pretrained(folder)
    llm = target.sources.llm
    if llm is not None:
        generation_settings(llm, plan, target).save_pretrained(folder)
    size, free = sum(tensor.nbytes for tensor in target.wanted.values()), shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"{folder.parent}: the model needs {size / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free"
        )
    new = initialised(model, plan.fresh, target.settings.seed)
    shards = list(split(target.wanted))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = plan.copied[name].tensor() if name in plan.copied else new[name]
            tensors[name] = tensor.detach().to(target.wanted[name].dtype, copy=True).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": size}, "weight_map": index}
        write_whole(folder / "model.safetensors.index.json", json.dumps(content, indent=2) + "\n")
    if llm is not None:
        llm.read = dict[str, torch.Tensor]().__getitem__


def split(wanted: dict[str, torch.Tensor]) -> Iterable[list[str]]:
    """The names of what is saved, shard by shard."""
    shard: list[str] = []
    size = 0
    for name, tensor in wanted.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def initialised(model: PreTrainedModel, names: Iterable[str], seed: int) -> dict[str, torch.Tensor]:
    """Tensors of a model on the meta device, drawn as its own `_init_weights` does; the others stay there."""
    names = list(names)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        shape = getattr(model.get_submodule(parent), leaf).shape
        empty = nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, empty)
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    torch.manual_seed(seed)
    model.initialize_weights()
    state = model.state_dict()
    for name in names:
        if state[name].isnan().any():
            raise ValueError(f"'{name}' cannot be initialised: {type(model).__name__} has no rule for it")
    return {name: state[name] for name in names}


def generation_settings(llm: Source, plan: Plan, target: Target) -> GenerationConfig:
    """The language model's; behind a BLIP-2's projection a text ends where BLIP-2's do, at the end of its line."""
    settings = GenerationConfig.from_model_config(llm.config)
    if (llm.folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(llm.folder)
    if "language_projection.weight" in plan.copied:
        if target.sources.kind == "blip-2":
            settings.eos_token_id = target.sources.qformer.config.text_config.eos_token_id
        elif newline := target.processor.tokenizer("\n", add_special_tokens=False)["input_ids"]:  # LAVIS blip2_opt.py
            settings.eos_token_id = newline[0]
    return settings


# -- checks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One comparison of the written model with a source: the largest difference, relative to the largest value."""

    what: str
    against: str
    difference: float
    tolerance: float


@dataclass(frozen=True)
class Example:
    """The test image, uint8[1, 3, S, S], noise [1, L] for its masking, and texts for the Q-Former and for the LLM."""

    pixels: torch.Tensor
    noise: torch.Tensor | None
    caption: dict[str, torch.Tensor]
    question: dict[str, torch.Tensor]

    def seen_by_clip(self, config: XFormerConfig, dtype: torch.dtype) -> torch.Tensor:
        """The test image as the CLIP tower takes it."""
        return scaled(self.pixels, config.clip_config.image_size, config.clip_mean, config.clip_std, dtype)


def make_example(config: XFormerConfig, processor: XFormerProcessor) -> Example:
    """A picture of waves in three colours, and two sentences: the same for everybody."""
    side = torch.linspace(0, 1, config.clip_config.image_size)
    rows, columns = side[:, None], side[None, :]
    waves = [torch.sin(9 * rows + 4 * columns), torch.cos(23 * columns * rows), torch.sin(40 * columns) * rows]
    pixels = ((torch.stack(waves) + 1) * 127.5).to(torch.uint8)[None]
    noise = None
    if config.reconstruction:
        length = (config.mae_image_size // config.mae_config.patch_size) ** 2
        noise = torch.rand(1, length, generator=torch.Generator().manual_seed(0))
    question = processor(text=QUESTION) if config.text_config is not None else {}
    return Example(pixels, noise, processor.qformer_inputs([CAPTION]), dict(question))


Answers = dict[str, torch.Tensor]


@torch.no_grad()
def verify(folder: Path, plan: Plan, target: Target) -> list[Check]:
    """Compare the written model with its sources: each is loaded by itself, run, and dropped again.

    Compared is what the sources say in full: not what depends on something that was initialised.
    """
    sources, example = target.sources, make_example(target.config, target.processor)
    tokens = tower_reference(target, example)
    expected = {"CLIP tokens": (sources.tower, tokens)}
    for name, answer in qformer_reference(target, plan, example, tokens).items():
        expected[name] = (sources.qformer, answer)
    if sources.mae is not None:
        name, answer = second_reference(sources.mae, target, example)
        expected[name] = (sources.mae, answer)
    found = own_answers(type(target.model).from_pretrained(folder).eval(), example)
    return [
        Check(name, source.label, difference(found[name], answer), TOLERANCE[target.settings.dtype])
        for name, (source, answer) in expected.items()
    ]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; of vocabularies that differ, of their common part."""
    columns = min(ours.shape[-1], theirs.shape[-1]) if ours.dim() else 1
    ours, theirs = (tensor.float().reshape(-1, tensor.shape[-1] if tensor.dim() else 1) for tensor in (ours, theirs))
    return ((ours[:, :columns] - theirs[:, :columns]).abs().max() / theirs[:, :columns].abs().max()).item()


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
        return answers | {"logits": model(example.pixels, **example.question).logits}
    scores = XFormerForImageTextRetrieval.forward
    ids, mask = example.caption["qformer_input_ids"], example.caption["qformer_attention_mask"]
    answers["ITC scores"] = scores(model, example.pixels, ids, mask).logits_per_image
    answers["ITM logits"] = scores(model, example.pixels, ids, mask, True).logits_per_image
    answers["text states"] = xformer.encode_text(ids, mask)
    return answers


def filled(build: Callable[[], nn.Module], pieces: Pieces, prefix: str, dtype: torch.dtype) -> Any:
    """A module of transformers with a source's tensors, copied one at a time."""
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


def tower_reference(target: Target, example: Example) -> torch.Tensor:
    """C before its layer norm, [1, N, D], by the tower's own class with its own hidden states."""
    config = target.config
    tower = filled(lambda: build_tower(config.clip_config), target.tower_pieces, "vision_model.", target.dtype)
    states = tower(example.seen_by_clip(config, target.dtype), output_hidden_states=True).hidden_states
    return states[config.clip_feature_layer]


def qformer_reference(target: Target, plan: Plan, example: Example, tokens: torch.Tensor) -> Answers:
    """What the Q-Former's source says: a BERT's text states; a BLIP-2's queries, and its scores or logits."""

    def initialised(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in plan.fresh)

    sources, config, pieces = target.sources, target.config, target.pieces
    if sources.kind == "bert":
        return {} if target.stage2 else {"text states": bert_reference(sources.qformer, example)}
    if config.fusion == "concat" or initialised(READS_IMAGES):
        return {}  # the queries are not the source's any more
    weight, bias = (pieces[f"vision_model.post_layernorm.{name}"].tensor().float() for name in ("weight", "bias"))
    states = nn.functional.layer_norm(tokens.float(), weight.shape, weight, bias, LN_VISION_EPSILON)
    qformer = filled(lambda: Blip2QFormerModel(config.qformer_config), pieces, "qformer.", torch.float32)
    query_tokens = pieces["query_tokens"].tensor().float()
    queries = qformer(query_embeds=query_tokens, encoder_hidden_states=states).last_hidden_state
    answers = {"queries": queries}
    if sources.llm is not None and not initialised(r"language_projection\."):
        answers["logits"] = logits_reference(target, sources.llm, example, queries)
    if not target.stage2 and not initialised(f"{READS_TEXT}|{SCORES}"):
        answers |= scores_reference(target, example, states)
    return answers


def bert_reference(source: Source, example: Example) -> torch.Tensor:
    """BERT's states of the caption; without token types, as LAVIS has it."""
    bert = BertModel.from_pretrained(source.folder, dtype="float32").eval()
    bert.embeddings.token_type_embeddings.weight.zero_()
    return bert(*example.caption.values()).last_hidden_state


def is_whole(sources: Sources) -> bool:
    """Whether transformers can load the Q-Former's source with its own tower as one BLIP-2."""
    return sources.kind == "blip-2" and sources.own_tower


def whole_blip2(kind: type[PreTrainedModel], target: Target) -> Any:
    """A BLIP-2 as transformers loads it, with what we train in float32 beside the frozen parts in half precision."""
    trained = ["query_tokens", "qformer", r"^embeddings\.", "(language|vision|text)_projection", "itm_head"]
    ours: Any = type(kind.__name__, (kind,), {"_keep_in_fp32_modules_strict": [*trained, "post_layernorm"]})
    model = ours.from_pretrained(target.sources.qformer.folder, dtype=target.dtype).eval()
    norm = model.vision_model.post_layernorm
    norm.eps = LN_VISION_EPSILON
    norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return model


class Shown(nn.Module):
    """Stands in a BLIP-2 where its vision tower would be: gives what another tower has seen."""

    def __init__(self, states: torch.Tensor):
        super().__init__()
        self.states = states

    def forward(self, *_, **__) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.states)


def scores_reference(target: Target, example: Example, states: torch.Tensor) -> Answers:
    """A stage-1 BLIP-2's scores of the test image with the caption; `states`: C behind its layer norm, [1, N, D]."""
    config = target.config
    if is_whole(target.sources):
        model = whole_blip2(Blip2ForImageTextRetrieval, target)
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
        model.vision_model, pixels = Shown(states), example.pixels
    model.config.image_token_index = None  # no placeholders in the caption
    ids, mask = example.caption.values()
    return {
        "ITC scores": model(pixels, ids, mask, return_dict=True).logits_per_image,
        "ITM logits": model(pixels, ids, mask, True, return_dict=True).logits_per_image,
    }


def logits_reference(target: Target, llm: Source, example: Example, queries: torch.Tensor) -> torch.Tensor:
    """The language model's logits for the question behind the test image; `queries`: Z_q, [1, Q, D]."""
    ids, mask = example.question["input_ids"], example.question["attention_mask"]
    at = ids.eq(target.processor.image_token_id)
    if is_whole(target.sources):
        model = whole_blip2(Blip2ForConditionalGeneration, target)
        unused = next(number for number in range(ids.numel() + 1) if number not in ids)
        model.config.image_token_index = unused  # theirs may be another than ours
        pixels = example.seen_by_clip(target.config, target.dtype)
        return model(pixels, ids.masked_fill(at, unused), mask).logits
    weight, bias = (target.pieces[f"language_projection.{name}"].tensor().float() for name in ("weight", "bias"))
    model = AutoModelForCausalLM.from_pretrained(llm.folder, config=llm.config, dtype=target.dtype).eval()
    embeds = model.get_input_embeddings()(ids[:, at.sum() :])
    prompt = nn.functional.linear(queries, weight, bias).to(embeds.dtype)
    return model(inputs_embeds=torch.cat([prompt, embeds], dim=1), attention_mask=mask).logits


def second_reference(source: Source, target: Target, example: Example) -> tuple[str, torch.Tensor]:
    """A MAE's own reconstruction loss; where nothing is reconstructed, the second encoder's tokens."""
    config, dtype = target.config, target.dtype
    pixels = scaled(example.pixels, config.mae_image_size, config.mae_mean, config.mae_std, dtype)
    if not config.has_mae:
        tower = filled(lambda: build_tower(config.mae_config), as_they_are(source), "", dtype)
        return "second encoder's tokens", tower_tokens(tower, pixels)
    own = AutoConfig.from_pretrained(source.folder, mask_ratio=config.mask_ratio if config.reconstruction else 0.0)
    mae = ViTMAEForPreTraining.from_pretrained(source.folder, config=own, dtype=dtype).eval()
    if not config.reconstruction:
        order = torch.arange(mae.vit.embeddings.patch_embeddings.num_patches)[None]
        return "second encoder's tokens", mae.vit(pixels, noise=order).last_hidden_state
    # The loss is taken in float32, as ours is, whatever the MAE computes in.
    mae.vit.embeddings.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))
    mae.decoder.decoder_pred.register_forward_hook(lambda _module, _inputs, output: output.float())
    return "reconstruction loss", mae(pixels.float(), noise=example.noise).loss


def show_checks(checks: Sequence[Check]) -> str:
    rows = [[c.what, c.against, f"{c.difference:.1e}", f"{c.tolerance:.0e}"] for c in checks]
    return _table(("on a test image", "against", "largest difference", "allowed"), rows)


def record(target: Target, table: dict[str, list[dict]], checks: Sequence[Check]) -> dict[str, Any]:
    """What is kept beside the weights: how they came to be, as data."""
    settings = {name: value for name, value in asdict(target.settings).items() if name != "output_dir"}
    folders = {source.label: source.folder for source in target.sources.all() if source.folder}
    revisions = {label: path.name for label, path in folders.items() if path.parent.name == "snapshots"}  # hub's cache
    return {"settings": settings, "revisions": revisions, **table, "checks": [asdict(check) for check in checks]}
