"""The start of stage 1 in the embedded world: tiny encoders, by default the shipped ones, and a tiny Q-Former."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, Blip2QFormerConfig, CLIPVisionModel, ViTMAEForPreTraining

from xformer_mllm.checkpoints import attention_for_device, copy_weights, load_second_encoder
from xformer_mllm.model.configuration_xformer import XFormerConfig
from xformer_mllm.model.modeling_xformer import XFormerForPreTraining
from xformer_mllm.model.processing_xformer import XFormerProcessor, image_processor
from xformer_mllm.variants import variant_config, with_second_encoder, with_settings

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped clip, mae, opt and qformer_tokenizer."""


def embedded_config(encoders: Path = WEIGHTS) -> XFormerConfig:
    """The configuration of the encoders in a folder and a tiny Q-Former, before any variant.

    Raises FileNotFoundError if the folder lacks a part.
    """
    for part in ("clip", "mae", "qformer_tokenizer"):
        if not (encoders / part).is_dir():
            raise FileNotFoundError(
                f"{encoders}: no {part}/ in it; train encoders with `xformer train encoders --output {encoders}`"
            )
    tokenizer = AutoTokenizer.from_pretrained(encoders / "qformer_tokenizer")
    clip = CLIPVisionModel.config_class.from_pretrained(encoders / "clip")
    return XFormerConfig(
        clip_config=clip,
        clip_feature_layer=-2,
        mae_config=ViTMAEForPreTraining.config_class.from_pretrained(encoders / "mae"),
        qformer_config=Blip2QFormerConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            encoder_hidden_size=clip.hidden_size,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            use_qformer_text_input=True,
        ),
        num_query_tokens=12,
        image_text_hidden_size=64,
        text_start_token_id=tokenizer.bos_token_id,
    )


def start_pretraining(
    variant: str = "xformer",
    seed: int = 0,
    second_encoder: str | None = None,
    settings: Sequence[str] = (),
    encoders: Path = WEIGHTS,
) -> tuple[XFormerForPreTraining, XFormerProcessor]:
    """Model and processor at the start of stage 1: frozen encoders, the rest initialised from `seed`.

    Args:
        variant: a name in `VARIANTS`.
        seed: of the initial weights.
        second_encoder: folder or Hub id of another MAE or vision tower; replaces the MAE.
        settings: fields of the configuration before the variant's own, as in `with_settings`.
        encoders: folder of `xformer train encoders`, with clip/, mae/ and qformer_tokenizer/.

    Raises:
        FileNotFoundError: if the folder of the encoders lacks a part.
        ValueError: for an unknown variant or setting, or a variant that does not fit the second encoder.
    """
    base = with_settings(embedded_config(encoders), settings)
    if second_encoder is not None:
        base = with_second_encoder(base, AutoConfig.from_pretrained(second_encoder))
    elif variant == "dinov2":
        raise ValueError("variant dinov2 needs --second-encoder, the folder or Hub id of a DINOv2")
    config = variant_config(variant, base)
    torch.manual_seed(seed)
    model = XFormerForPreTraining._from_config(config, attn_implementation=attention_for_device())
    clip = CLIPVisionModel.from_pretrained(encoders / "clip")
    copy_weights(clip.state_dict(), model.xformer.clip_encoder.tower, "CLIP")
    if model.xformer.mae_encoder is not None and variant != "random_mae":
        load_second_encoder(model.xformer, second_encoder or encoders / "mae")
    tokenizer = AutoTokenizer.from_pretrained(encoders / "qformer_tokenizer")
    processor = XFormerProcessor(image_processor(config.clip_config.image_size), tokenizer, tokenizer)
    return model, processor
