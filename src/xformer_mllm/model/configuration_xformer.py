"""The configuration of every X-Former model: nested configurations of the parts, and the few choices between them.

The defaults are the paper's: EVA-CLIP ViT-g, MAE ViT-H, BLIP-2's Q-Former, OPT 2.7B, dual cross-attention.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig, ViTMAEConfig
from transformers.configuration_utils import PreTrainedConfig

OPENAI_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
HALF = [0.5, 0.5, 0.5]

# Pixel statistics of a kind of tower, if they are not the defaults of `clip_mean` and `mae_mean`.
PIXEL_STATISTICS = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "blip_2_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (HALF, HALF),
    "siglip2_vision_model": (HALF, HALF),
}
# Towers that interpolate their position embeddings.
ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit", "siglip2_vision_model")

FUSIONS = ("none", "concat", "early_cross_attention", "dual_cross_attention")


def _nested(value: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    """A sub-configuration, from a dictionary with its `model_type` as in `config.json`."""
    if not isinstance(value, dict):
        return value
    return AutoConfig.for_model(**value)


def _vision(value: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    """A vision tower's configuration; for a whole CLIP or SigLIP, that of its vision tower."""
    config = _nested(value)
    return getattr(config, "vision_config", config)


class XFormerConfig(PreTrainedConfig):
    """Configuration of X-Former and of the models that the paper compares it with (see `variants.py`).

    Args:
        clip_config: the contrastive tower: `Blip2VisionConfig` (EVA-CLIP ViT-g), `CLIPVisionConfig`, `SiglipVisionConfig`.
        mae_config: the second encoder, whose tokens are M; None for a model without one. `ViTMAEConfig` for a MAE with its
            decoder, or another vision tower's, whose last hidden state is M: `Dinov2Config`, `Dinov2WithRegistersConfig`,
            `DINOv3ViTConfig`, `SiglipVisionConfig` (SigLIP, and SigLIP 2 of fixed resolution), `Siglip2VisionConfig`
            (NaFlex), `CLIPVisionConfig`. These have no decoder: they need `reconstruction=False`, and no patches are masked.
        qformer_config: `Blip2QFormerConfig`; stage 1 needs `use_qformer_text_input=True` (text feed-forwards).
        text_config: any causal language model's configuration, or an encoder-decoder's (FlanT5); None before stage 2.
        clip_feature_layer: layer of the tower whose output is C. BLIP-2 uses the penultimate layer (-2); transformers'
            `Blip2VisionConfig` describes a ViT-g without its last layer, so there it is -1.
        clip_shallow_layer: if set, M is this layer of the CLIP tower and there is no MAE (the paper's ablation: 26).
        fusion: one of `FUSIONS`.
        fusion_blocks: number of dual cross-attention blocks.
        reconstruction: whether stage 1 has the masked-image reconstruction loss.
        reconstruction_in_stage2: whether stage 2 keeps it (the paper's ablation; it hurts).
        instruction_aware: in stage 2 the queries also read the language model's prompt inside the Q-Former (InstructBLIP);
            not in the paper.
        lora_rank: rank of the language model's LoRA adapters in stage 2 (needs the package peft); 0 for none, as in the
            paper.
        mask_ratio: share of the MAE's patches that are masked for the reconstruction loss.
        label_smoothing: of ITC and ITG (BLIP-2's 0.1).
        initial_temperature: of ITC, learned (BLIP-2's 0.07).
        image_text_hidden_size: width of the shared image-text space of ITC.
        image_token_index: id of the image placeholder in the language model's tokenizer; set with the tokenizer.
        text_start_token_id: id of [DEC] in the Q-Former's tokenizer, which starts a generated text (ITG).
        clip_mean, clip_std, mae_mean, mae_std: per-channel statistics of pixels in [0, 1], applied inside the model; by
            default those of the kind of tower (`PIXEL_STATISTICS`; else CLIP's, and ImageNet's for M).
        mae_image_size: side of the second encoder's images; by default its own, and for towers of `ANY_SIZE` the CLIP's, in
            whole patches (DINOv2's own 518 pixels would only enlarge the CLIP's 224).
        itc_weight, itm_weight, itg_weight, reconstruction_weight: weights of the stage-1 losses (all 1 in the paper).

    Raises:
        ValueError: for values that contradict each other.
    """

    model_type = "xformer"
    # Trainer's predictions are the other outputs: logits.
    keys_to_ignore_at_inference = [
        "xformer_output",
        "lm_loss",
        "reconstruction_loss",
        "itc_loss",
        "itm_loss",
        "itg_loss",
    ]
    keys_to_ignore_at_inference += ["itc_accuracy", "itm_accuracy"]
    sub_configs = {
        "clip_config": AutoConfig,
        "mae_config": AutoConfig,
        "qformer_config": Blip2QFormerConfig,
        "text_config": AutoConfig,
    }

    clip_config: Any = None
    mae_config: Any = None
    qformer_config: Any = None
    text_config: Any = None
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    image_token_index: int | None = None
    text_start_token_id: int = 30522
    clip_feature_layer: int = -1
    clip_shallow_layer: int | None = None
    fusion: str = "dual_cross_attention"
    fusion_blocks: int = 1
    reconstruction: bool = True
    reconstruction_in_stage2: bool = False
    instruction_aware: bool = False
    lora_rank: int = 0
    mask_ratio: float = 0.5
    label_smoothing: float = 0.1
    initial_temperature: float = 0.07
    itc_weight: float = 1.0
    itm_weight: float = 1.0
    itg_weight: float = 1.0
    reconstruction_weight: float = 1.0
    clip_mean: Any = None
    clip_std: Any = None
    mae_mean: Any = None
    mae_std: Any = None
    mae_image_size: Any = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True  # of ITG's head, as in BERT

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The CLIP tower's configuration, by the name that tools read from a vision-language model."""
        return self.clip_config

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a configuration as transformers does, but refuse those of other models, which would get defaults.

        Raises:
            ValueError: if it is not an X-Former's.
        """
        source = pretrained_model_name_or_path
        fields, kwargs = super().get_config_dict(source, **kwargs)
        within = [value for value in fields.values() if isinstance(value, dict)]  # what an X-Former is attached to
        if all(part.get("model_type") != cls.model_type for part in [fields, *within]):
            file = source if os.path.isfile(source) else os.path.join(source, "config.json")
            model = os.path.join(os.path.dirname(file), "model")
            kind = fields.get("model_type", "unknown")
            what = f"{file} is not an X-Former's configuration (model_type: {kind})"
            if "model_type" not in fields and os.path.isdir(model):
                what = f"{file} is a run's configuration; the model's is in {model}"
            raise ValueError(what)
        return fields, kwargs

    def __post_init__(self, **kwargs):
        self.clip_config = _vision(self.clip_config)
        self.mae_config = _vision(self.mae_config)
        self.text_config = _nested(self.text_config)
        if isinstance(self.qformer_config, dict):
            self.qformer_config = Blip2QFormerConfig(**self.qformer_config)
        if self.clip_config is None:  # the paper's encoders
            self.clip_config = Blip2VisionConfig()
            if self.mae_config is None and self.fusion != "none":
                self.mae_config = ViTMAEConfig(
                    hidden_size=1280,
                    num_hidden_layers=32,
                    num_attention_heads=16,
                    intermediate_size=5120,
                    patch_size=14,
                )
        if self.qformer_config is None:  # BERT-base with [DEC] added to its vocabulary
            self.qformer_config = Blip2QFormerConfig(
                vocab_size=30523, encoder_hidden_size=self.clip_config.hidden_size, use_qformer_text_input=True
            )
        self._set_pixel_defaults()
        super().__post_init__(**kwargs)
        self._check()
        self._check_sizes()

    def _set_pixel_defaults(self) -> None:
        """Set mean, deviation and size of both encoders' pixels by their kinds, unless given."""
        if not hasattr(self.clip_config, "image_size"):
            raise ValueError(
                f"clip_config: a {self.clip_config.model_type} has no image_size; use it as the second encoder only"
            )
        clip = PIXEL_STATISTICS.get(self.clip_config.model_type, (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        self.clip_mean, self.clip_std = self.clip_mean or clip[0], self.clip_std or clip[1]
        kind = getattr(self.mae_config, "model_type", "")
        sizes = ("hidden_size", "num_attention_heads", "patch_size", *(() if kind in ANY_SIZE else ("image_size",)))
        for name in sizes if kind else ():
            if not isinstance(getattr(self.mae_config, name, None), int):  # others have none, or one for each stage
                raise ValueError(
                    f"mae_config: a {kind} has no single {name}; the second encoder must be a vision transformer, "
                    "such as a ViTMAEConfig or a Dinov2Config describes"
                )
        mae = PIXEL_STATISTICS.get(kind, (IMAGENET_MEAN, IMAGENET_STD))
        self.mae_mean, self.mae_std = self.mae_mean or mae[0], self.mae_std or mae[1]
        if kind in ANY_SIZE:
            patch = self.mae_config.patch_size
            self.mae_image_size = self.mae_image_size or self.clip_config.image_size // patch * patch
        elif kind:
            self.mae_image_size = self.mae_image_size or self.mae_config.image_size

    @classmethod
    def paper(cls, llm: PreTrainedConfig | None = None) -> XFormerConfig:
        """The sizes of the paper (section "Parts" of its set-up); `llm` defaults to OPT 2.7B's."""
        opt = OPTConfig(
            hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=2560
        )
        return cls(text_config=llm or opt)

    @property
    def has_second_encoder(self) -> bool:
        """Whether the model has tokens M."""
        return self.mae_config is not None or self.clip_shallow_layer is not None

    @property
    def has_mae(self) -> bool:
        """Whether M comes from a MAE, which can mask patches and has a decoder."""
        return self.mae_config is not None and self.mae_config.model_type == ViTMAEConfig.model_type

    @property
    def second_encoder_config(self) -> PreTrainedConfig:
        """Configuration of the tower whose tokens are M."""
        return self.clip_config if self.mae_config is None else self.mae_config

    def _check(self) -> None:
        layers = self.clip_config.num_hidden_layers
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion '{self.fusion}' is unknown; choose one of {', '.join(FUSIONS)}")
        if self.qformer_config.encoder_hidden_size != self.clip_config.hidden_size:
            raise ValueError(
                f"qformer_config.encoder_hidden_size is {self.qformer_config.encoder_hidden_size}, but the CLIP tower is "
                f"{self.clip_config.hidden_size} wide; make them equal"
            )
        if not -layers <= self.clip_feature_layer < layers:
            raise ValueError(f"clip_feature_layer {self.clip_feature_layer}: the CLIP tower has {layers} layers")
        if self.clip_shallow_layer is not None and not 0 <= self.clip_shallow_layer < layers:
            raise ValueError(f"clip_shallow_layer {self.clip_shallow_layer}: the CLIP tower has {layers} layers")
        if self.mae_config is not None and self.clip_shallow_layer is not None:
            raise ValueError("mae_config and clip_shallow_layer both name the source of M; set one of them to None")
        if self.fusion != "none" and not self.has_second_encoder:
            raise ValueError(
                f"fusion '{self.fusion}' needs a second encoder: give a mae_config or a clip_shallow_layer"
            )
        if self.reconstruction_in_stage2 and not self.reconstruction:
            raise ValueError("reconstruction_in_stage2 needs reconstruction")
        if self.reconstruction and self.mae_config is not None and not self.has_mae:
            raise ValueError(
                f"reconstruction needs the decoder of a MAE, and a {self.mae_config.model_type} has none; "
                "set reconstruction=False, as the variants dinov2 and no_reconstruction do"
            )
        if self.reconstruction and (self.mae_config is None or self.fusion != "dual_cross_attention"):
            raise ValueError(
                "reconstruction needs a MAE and the dual cross-attention: no other fusion changes the tokens M, "
                "so the loss would train nothing; set reconstruction=False"
            )
        if self.instruction_aware and not self.qformer_config.use_qformer_text_input:
            raise ValueError("instruction_aware needs qformer_config.use_qformer_text_input")
        for name in ("num_query_tokens", "fusion_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; it must be 0 (no adapters) or more")
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; it must be at least 0 and below 1")
        if self.reconstruction and self.mask_ratio == 0.0:
            raise ValueError("reconstruction needs a mask_ratio above 0: its loss is on masked patches only")

    def _check_sizes(self) -> None:
        sizes = [("clip_config", self.clip_config, self.clip_config.image_size)]
        if self.mae_config is not None:
            sizes.append(("mae_config", self.mae_config, self.mae_image_size))
            kind = self.mae_config.model_type
            if kind not in ANY_SIZE and self.mae_image_size != self.mae_config.image_size:
                raise ValueError(
                    f"mae_image_size is {self.mae_image_size}, but this {kind} only takes {self.mae_config.image_size}"
                )
        for name, tower, size in sizes:
            if size == 0 or size % tower.patch_size:
                raise ValueError(f"{name}: image_size {size} is not a multiple of patch_size {tower.patch_size}")


__all__ = ["FUSIONS", "XFormerConfig"]
