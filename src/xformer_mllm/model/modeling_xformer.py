"""X-Former: a frozen CLIP and a frozen MAE encoder, fused by a Q-Former and a dual cross-attention, for a frozen LLM.

Read top down, in the order of the paper's figure: `XFormerModel` (encoders, Q-Former, fusion), then the heads:
`XFormerForImageTextRetrieval` (scores), `XFormerForPreTraining` (stage 1), `XFormerForConditionalGeneration` (stage 2).

`B` batch, `Q` queries, `T` text tokens, `N` CLIP tokens, `L` MAE patches, `D` Q-Former width, `E` LLM width.
"""

import copy
import dataclasses
import importlib
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    PreTrainedModel,
    ViTMAEModel,
)
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder
from transformers.utils import ModelOutput, can_return_tuple

from . import losses, masks
from .configuration_xformer import XFormerConfig
from .distributed import equally_long, gather, rank, share, world_size
from .fusion import ZeroLinear, build_fusion
from .outputs import (
    XFormerForConditionalGenerationOutput,
    XFormerForImageTextRetrievalOutput,
    XFormerForPreTrainingOutput,
    XFormerImageFeaturesOutput,
    XFormerModelOutput,
)
from .qformer import build_qformer, project_image
from .reconstruction import reconstruction_loss
from .vision_encoders import (
    ClipEncoder,
    ImageTokens,
    build_tower,
    check_pixels,
    dtype_of,
    encode_second,
    is_frozen,
    mae_positions,
    scaled,
    unmasked,
)

FROZEN = ("clip_encoder", "mae_encoder", "mae_decoder", "language_model")
STANDARDISED_AT_ONCE = 32  # images
ROWS = 64  # of ITG's logits on a CPU: a multiple of it, as it compiles and keeps kernels for each number of rows
LORA = ".lora_"  # in the names of adapters' weights
# Names of trained modules and parameters, as patterns: anchored, as towers and language models have "embeddings", too.
TRAINED = [r"^(?:xformer\.)?(?:clip_layernorm|query_tokens|embeddings|qformer|fusion)"]
TRAINED_HEADS = [r"^(?:vision_projection|text_projection|itm_head)"]
TRAINED_ADAPTERS = [r".*lora_[AB]"]


def _also(patterns: list[str]) -> list[str]:
    """The same patterns in other words: transformers wants its two lists of fp32 modules disjoint."""
    return [f"(?:{pattern})" for pattern in patterns]


class XFormerPreTrainedModel(PreTrainedModel):
    config_class = XFormerConfig
    base_model_prefix = "xformer"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Trained parts stay fp32, whatever dtype the frozen ones are loaded in.
    _keep_in_fp32_modules_strict = TRAINED
    _keep_in_fp32_modules = _also(TRAINED)  # quantisers leave these out
    accepts_loss_kwargs = False  # losses are means over the batch: Trainer divides them by the accumulation steps
    _no_split_modules = ("Blip2QFormerLayer", "DualCrossAttentionBlock")

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, TiedLinear) and self.config.tie_word_embeddings:
            return
        super()._init_weights(module)
        if isinstance(module, Blip2TextEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
        elif isinstance(module, ViTMAEDecoder):  # transformers leaves its positions and its mask token at zero
            module.initialize_weights(module.decoder_pos_embed.shape[1] - 1)
        elif isinstance(module, XFormerModel):
            # transformers starts queries at zero, and equal queries get equal gradients: they would stay equal.
            init.normal_(module.query_tokens, std=self.config.initializer_range)
            if isinstance(module.mae_encoder, ViTMAEModel):  # transformers leaves these positions at zero, too
                positions = module.mae_encoder.embeddings.position_embeddings
                init.copy_(positions, mae_positions(positions.shape[1] - 1, positions.shape[2]))
        elif isinstance(module, XFormerForPreTraining):
            init.constant_(module.temperature, self.config.initial_temperature)
            init.zeros_(module.itg_bias)
        elif isinstance(module, ZeroLinear):  # at step 0, Z' = Z_q and M' = M
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def _maps(self, output_attentions: bool | None, output_hidden_states: bool | None) -> dict[str, bool]:
        """What to return besides the outputs: by default what the configuration says."""
        config = self.config
        return {
            "output_attentions": config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states,
        }

    def freeze(self) -> None:
        """Stop training what the paper freezes in both stages: both encoders, the MAE's decoder, the language model.

        A language model's LoRA adapters, if it has any, are trained.
        """
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in FROZEN:
                module.requires_grad_(False)
        for name, parameter in self.named_parameters():
            if LORA in name:
                parameter.requires_grad_(True)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen parts, which config.json records and the model is loaded in; trained parts are always fp32."""
        for name, parameter in self.named_parameters():
            if set(FROZEN) & set(name.split(".")[:2]) and parameter.is_floating_point():  # quantised weights are not
                return parameter.dtype
        return super().dtype

    def train(self, mode: bool = True):
        """Set the mode of all modules but frozen encoders, which stay in evaluation mode (BLIP-2's `disabled_train`)."""
        super().train(mode)
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in ("clip_encoder", "mae_encoder", "mae_decoder") and is_frozen(module):
                module.eval()
        return self


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _check_range(image_index, images: int) -> None:
    """Called at inference only: it waits for a GPU, which a training step must not."""
    named = [] if image_index is None else torch.as_tensor(image_index).tolist()
    if any(not 0 <= place < images for place in named):
        raise ValueError(f"image_index is {named}, but must be from 0 to {images - 1} ({_counted(images, 'image')})")


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every dropout rate of a frozen language model's configuration to 0, in place."""
    for name, value in list(vars(config).items()):  # dropout (OPT), dropout_rate (T5), resid_pdrop (GPT-2), ...
        if "drop" in name and type(value) in (int, float):
            setattr(config, name, 0.0)
    return config


def language_model_class(config: PreTrainedConfig) -> Any:
    """transformers' Auto class for an encoder-decoder or a decoder with this configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def add_lora(language_model: PreTrainedModel, rank: int) -> None:
    """Add LoRA adapters, in fp32, to every linear layer but the vocabulary's; alpha is twice the rank.

    They start without effect: B is zero.

    Raises:
        ModuleNotFoundError: without the package peft.
    """
    peft = importlib.import_module("peft")  # optional; trust_remote_code installs every import statement's package
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    peft.inject_adapter_in_model(settings, language_model)
    for name, parameter in language_model.named_parameters():
        if LORA in name:
            parameter.data = parameter.data.float()


def _resize(model: PreTrainedModel, *args, **kwargs) -> nn.Module:
    """Resize the Q-Former's vocabulary: transformers' own function notes the size of `text_config` alone."""
    text = model.config.text_config
    size = None if text is None else text.vocab_size
    words = PreTrainedModel.resize_token_embeddings(model, *args, **kwargs)
    if text is not None:
        text.vocab_size = size
    model.config.qformer_config.vocab_size = words.num_embeddings
    return words


class XFormerModel(XFormerPreTrainedModel):
    """Encoders -> Q-Former -> fusion: C, M, Z_q, Z', M' (paper figure 2)."""

    def __init__(self, config: XFormerConfig):
        super().__init__(config)
        shallow = [] if config.clip_shallow_layer is None else [config.clip_shallow_layer]
        self.clip_encoder = ClipEncoder(config.clip_config, [config.clip_feature_layer, *shallow])
        self.clip_layernorm = nn.LayerNorm(config.clip_config.hidden_size, eps=1e-5)
        self.mae_encoder = None if config.mae_config is None else build_tower(config.mae_config)
        self.mae_decoder = None
        if config.reconstruction:
            num_patches = self.mae_encoder.embeddings.patch_embeddings.num_patches
            self.mae_decoder = ViTMAEDecoder(self.mae_encoder.config, num_patches)
        width = config.qformer_config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.embeddings = None
        if config.qformer_config.use_qformer_text_input:
            self.embeddings = Blip2TextEmbeddings(config.qformer_config)
        self.qformer = build_qformer(config.qformer_config)
        self.fusion = build_fusion(config, self.qformer)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return None if self.embeddings is None else self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """Resize the Q-Former's vocabulary, with the arguments of transformers' function."""
        return _resize(self, *args, **kwargs)

    def encode_image(
        self,
        pixel_values: torch.Tensor | None,
        mask_ratio: float = 0.0,
        noise: torch.Tensor | None = None,
        features: dict[str, torch.Tensor] | None = None,
    ) -> ImageTokens:
        """Encode uint8[B, 3, H, W] (or float in [0, 1]) -> C and M. Only the MAE's patches are masked.

        Args:
            features: outputs of `frozen_features` for the same images, used instead of running the encoders.

        Raises:
            ValueError: for pixels of another type or shape.
        """
        features = features or {}
        if not features.keys() >= ({"clip"} if self.mae_encoder is None else {"clip", "mae"}):
            check_pixels(pixel_values)
        clip_states, *shallow = features["clip"].unbind(1) if "clip" in features else self._clip_states(pixel_values)
        mae, pixels = None, None
        if shallow:  # an earlier CLIP layer in place of M
            mae = unmasked(shallow[0])
        elif "mae" in features:
            mae = unmasked(features["mae"])
        elif self.mae_encoder is not None:
            mae, pixels = encode_second(self.mae_encoder, self.config, pixel_values, mask_ratio, noise)
        return ImageTokens(self._normed(clip_states), mae, pixels, clip_states)

    def _normed(self, clip_states: torch.Tensor) -> torch.Tensor:
        return self.clip_layernorm(clip_states.to(self.clip_layernorm.weight.dtype))

    def _clip_states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states of the CLIP layers that are used, [B, N, D_clip] each."""
        config, tower = self.config, self.clip_encoder
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(tower)):
            dtype = dtype_of(tower)
            size = config.clip_config.image_size
            return tower(scaled(pixel_values, size, config.clip_mean, config.clip_std, dtype))

    @torch.no_grad()
    def frozen_features(self, pixel_values: torch.Tensor, masked: bool) -> dict[str, torch.Tensor]:
        """Outputs of the frozen encoders, to cache and pass to `forward` as `features`.

        {"clip": [B, layers used, N, D_clip]} and, unless each step masks other patches (`masked`), "mae": [B, 1+L, D_mae].
        """
        check_pixels(pixel_values)
        features = {"clip": torch.stack(self._clip_states(pixel_values), dim=1)}
        if self.mae_encoder is not None and not masked:
            features["mae"] = encode_second(self.mae_encoder, self.config, pixel_values)[0].tokens
        return features

    @torch.no_grad()
    def standardise(self, pixel_values: torch.Tensor) -> None:
        """Initialise the layer norms that read C and M so that each channel has mean 0 and deviation 1 over these images.

        Local detail is often a small part of the variance of a frozen encoder's tokens, and slow to learn from there.
        For new norms only: those of a BLIP-2 checkpoint are trained. Z' = Z_q and M' = M still hold at step 0.
        """
        parts = [self.frozen_features(some, masked=False) for some in pixel_values.split(STANDARDISED_AT_ONCE)]
        image = self.encode_image(
            pixel_values, features={name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        )
        pairs = [(self.clip_layernorm, image.clip_tokens)]
        if image.mae is not None:
            tokens = image.mae.tokens.to(self.query_tokens.dtype)
            pairs += [(norm, norm(tokens)) for norm in self.fusion.mae_norms()]
        for norm, normed in pairs:
            deviation, mean = torch.std_mean(normed.flatten(0, 1), dim=0)
            norm.weight.copy_(1 / deviation.clamp(min=1e-3))
            norm.bias.copy_(-mean / deviation.clamp(min=1e-3))

    def project(self, image: ImageTokens) -> ImageTokens:
        """Project what of the images does not depend on a text once, for several calls of `read`.

        Not under gradient checkpointing, which is to keep less and can only follow what a layer itself computes.
        """
        if self.training and any(layer.gradient_checkpointing for layer in self.qformer.encoder.layer):
            return image
        mae_tokens = None if image.mae is None else image.mae.tokens.to(self.query_tokens.dtype)
        states = self.fusion.image_states(image.clip_tokens, mae_tokens)
        keys_values, mae_queries = project_image(self.qformer, states), self.fusion.mae_queries(mae_tokens)
        return dataclasses.replace(image, keys_values=keys_values, mae_queries=mae_queries)

    def of_all_processes(self, image: ImageTokens, index: torch.Tensor) -> ImageTokens:
        """Select images of all processes, int64[P], and project them.

        The outputs of the frozen encoders are gathered: they need no gradient, and are narrower than what is made of them.
        """
        frozen = ImageTokens(image.clip_states, image.mae).map(lambda tensor: gather(tensor)[index])
        return self.project(ImageTokens(self._normed(frozen.clip_tokens), frozen.mae))

    def read(
        self,
        image: ImageTokens,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        queries_only: bool = False,
    ) -> XFormerModelOutput:
        """Let the queries read C in the Q-Former, then M in the fusion: `forward` on images that are encoded already.

        Args:
            image: C and M of B images; with `project`ed keys and values if they are read several times.
            input_ids: int64[B, T] of the Q-Former's tokenizer, read together with the queries; None for queries alone.
            attention_mask: bool[B, 1, Q+T, Q+T], one of `masks.py`, or [B, Q+T], 1 = token; None for queries alone.
            output_attentions: also return the queries' attention maps (eager attention only).
            output_hidden_states: also return the hidden states of the Q-Former's layers.
            queries_only: the text's last states are not needed and not computed.
        """
        return self(
            image=image,
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            queries_only=queries_only,
            return_dict=True,
        )

    def _self_attentions(self, maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The Q-Former's self-attention maps; transformers (5.23) records a layer's cross-attention after its own."""
        layers, found = self.qformer.encoder.layer, iter(maps)
        if len(maps) <= len(layers):  # without cross-attention; or none, as only eager attention has maps
            return maps
        kept = []
        for layer in layers:
            kept.append(next(found))
            if layer.has_cross_attention:
                next(found)
        return tuple(kept)

    def _embed(self, input_ids: torch.Tensor, query_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Embed int64[B, T] after the queries.

        As `Blip2TextEmbeddings`, whose forward reads a device from its weight and so cannot be offloaded.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        words = self.embeddings.word_embeddings(input_ids) + self.embeddings.position_embeddings(positions)
        return words if query_tokens is None else torch.cat([query_tokens.to(words.dtype), words], dim=1)

    def encode_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, kept: int | None = None
    ) -> torch.Tensor:
        """Encode text alone with the Q-Former: int64[B, T] and its padding mask [B, T] -> [B, T, D].

        kept: how many of the first states to return, all by default.
        """
        embeds = self._embed(input_ids)
        return self.qformer(
            query_embeds=embeds, query_length=0, attention_mask=attention_mask, kept=kept
        ).last_hidden_state

    def reconstruct(self, output: XFormerModelOutput) -> torch.Tensor:
        """Decode M' with the frozen decoder -> predicted patches [B, L, P] (paper section "Stage 1")."""
        decoder = self.mae_decoder
        tokens = output.enriched_mae_tokens.to(dtype_of(decoder))
        return decoder(tokens, output.ids_restore).logits

    def reconstruction_loss(self, image: ImageTokens, output: XFormerModelOutput) -> torch.Tensor:
        """Loss on the masked patches, against the pixels that the MAE was given."""
        config = self.config.mae_config
        return reconstruction_loss(
            self.reconstruct(output), image.pixels, output.mae_mask, config.patch_size, config.norm_pix_loss
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        mask_ratio: float = 0.0,
        noise: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        image: ImageTokens | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        queries_only: bool = False,
    ) -> XFormerModelOutput:
        """Encode images, and texts separately (neither sees the other).

        Args:
            pixel_values: uint8[B, 3, H, W], or float in [0, 1].
            mask_ratio: share of the MAE's patches to mask, in [0, 1).
            noise: [B, L] for the masking; drawn if None.
            qformer_input_ids, qformer_attention_mask: int64[texts, T], for `text_states`.
            output_attentions: also return attention maps (eager attention only).
            output_hidden_states: also return the hidden states of the Q-Former's layers.
            image, input_ids, attention_mask, queries_only: as in `read`, instead of `pixel_values`.
        """
        maps = self._maps(output_attentions, output_hidden_states)
        with_attentions = maps["output_attentions"]
        if image is None:
            image = self.encode_image(pixel_values, mask_ratio, noise)
        mae_tokens = None if image.mae is None else image.mae.tokens.to(self.query_tokens.dtype)
        query_tokens = self.query_tokens.expand(image.clip_tokens.shape[0], -1, -1)
        embeds = query_tokens if input_ids is None else self._embed(input_ids, query_tokens)
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = masks.to_additive(attention_mask, embeds.dtype)
        read: dict[str, Any]
        if image.keys_values is None:
            read = {"encoder_hidden_states": self.fusion.image_states(image.clip_tokens, mae_tokens)}
        else:
            read = {"encoder_hidden_states": image.clip_tokens, "keys_values": image.keys_values}
        if queries_only and not any(maps.values()):
            read["kept"] = query_tokens.shape[1]
        qformer_output = self.qformer(
            query_embeds=embeds,
            query_length=query_tokens.shape[1],
            attention_mask=attention_mask,
            **maps,
            **read,
            **self.fusion.qformer_inputs(mae_tokens),
        )
        states = qformer_output.last_hidden_state
        queries, text_states = states[:, : query_tokens.shape[1]], states[:, query_tokens.shape[1] :]
        fused = self.fusion(queries, mae_tokens, image.mae_queries)
        if qformer_input_ids is not None:
            text_states = self.encode_text(qformer_input_ids, qformer_attention_mask)
        return XFormerModelOutput(
            clip_tokens=image.clip_tokens,
            mae_tokens=mae_tokens,
            queries=queries,
            fused_queries=fused.queries,
            enriched_mae_tokens=fused.mae_tokens,
            text_states=text_states if text_states.shape[1] else None,
            mae_mask=None if image.mae is None else image.mae.mask,
            ids_restore=None if image.mae is None else image.mae.ids_restore,
            clip_attentions=qformer_output.cross_attentions if with_attentions else None,
            mae_attentions=fused.attentions if with_attentions else None,
            attentions=self._self_attentions(qformer_output.attentions) if with_attentions else None,
            hidden_states=qformer_output.hidden_states if maps["output_hidden_states"] else None,
        )


class XFormerForImageTextRetrieval(XFormerPreTrainedModel):
    """Scores of images and texts: ITC (cosine) and ITM (a head on each query, averaged), both on Z'."""

    _keys_to_ignore_on_load_unexpected = (r"itg_.*", r"temperature")
    _keep_in_fp32_modules_strict = TRAINED + TRAINED_HEADS
    _keep_in_fp32_modules = _also(TRAINED + TRAINED_HEADS)

    def __init__(self, config: XFormerConfig):
        super().__init__(config)
        self.xformer = XFormerModel(config)
        width = config.qformer_config.hidden_size
        self.vision_projection = nn.Linear(width, config.image_text_hidden_size)
        self.text_projection = nn.Linear(width, config.image_text_hidden_size)
        self.itm_head = nn.Linear(width, 2)
        self._add_heads(config)
        self.post_init()

    def _add_heads(self, config: XFormerConfig) -> None:
        """Add the heads that only stage 1 needs."""

    def get_input_embeddings(self) -> nn.Module | None:
        return self.xformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.xformer.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """Resize the Q-Former's vocabulary, with the arguments of transformers' function."""
        return _resize(self, *args, **kwargs)

    def image_features(self, fused_queries: torch.Tensor) -> torch.Tensor:
        """Project Z' -> [B, Q, image_text_hidden_size], of unit length."""
        return normalize(self.vision_projection(fused_queries).float(), dim=-1)

    def text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Project the [CLS] state of texts -> [B, image_text_hidden_size], of unit length."""
        states = self.xformer.encode_text(input_ids, attention_mask, kept=1)
        return normalize(self.text_projection(states[:, 0]).float(), dim=-1)

    def match(
        self, image: ImageTokens, input_ids: torch.Tensor, attention_mask: torch.Tensor, **maps: bool
    ) -> tuple[torch.Tensor, XFormerModelOutput]:
        """Match B image-text pairs: queries and text read each other -> ITM logits [B, 2]. maps: as in `read`."""
        mask = masks.bidirectional_mask(attention_mask, self.config.num_query_tokens)
        output = self.xformer.read(image, input_ids, mask, queries_only=True, **maps)
        return self.itm_head(output.fused_queries).mean(dim=1), output

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor,
        use_image_text_matching_head: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> XFormerForImageTextRetrievalOutput:
        """Score every image with every text (ITC), or each image with its own text (ITM, `use_image_text_matching_head`).

        output_attentions, output_hidden_states: also return the Q-Former's.
        """
        image = self.xformer.encode_image(pixel_values)
        maps = self._maps(output_attentions, output_hidden_states)
        if use_image_text_matching_head:
            logits, output = self.match(image, qformer_input_ids, qformer_attention_mask, **maps)
            image_embeds = text_embeds = None
        else:
            output = self.xformer.read(image, **maps)
            image_embeds = self.image_features(output.fused_queries)
            text_embeds = self.text_features(qformer_input_ids, qformer_attention_mask)
            logits = losses.image_text_similarity(image_embeds, text_embeds)
        return XFormerForImageTextRetrievalOutput(
            logits_per_image=logits,
            logits_per_text=logits.t(),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            xformer_output=output,
        )


class TiedLinear(nn.Linear):
    """BERT's prediction of words, whose weight is the word embeddings'; the bias is the model's own parameter."""

    def forward(
        self,
        states: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """[..., D] -> logits [..., V]; with targets int64[N], of states [N, D], their mean cross-entropy."""
        if targets is None:
            return nn.functional.linear(states, self.weight, bias)
        return losses.linear_cross_entropy(states, self.weight, bias, targets, label_smoothing)


class XFormerForPreTraining(XFormerForImageTextRetrieval):
    """Stage 1: ITC + ITM + ITG + reconstruction (paper section "Stage 1").

    Three Q-Former passes: queries and text under the multimodal causal mask (there the queries do not see the text, so
    it serves ITG, ITC's image side and the reconstruction), text alone, and queries and text together for ITM.
    """

    _tied_weights_keys = {"itg_head.weight": "xformer.embeddings.word_embeddings.weight"}
    _keep_in_fp32_modules_strict = [*TRAINED, *TRAINED_HEADS, r"^(?:itg_\w+|temperature)"]
    _keep_in_fp32_modules = _also(_keep_in_fp32_modules_strict)

    def _add_heads(self, config: XFormerConfig) -> None:
        if config.qformer_config.use_qformer_text_input is False:
            raise ValueError("stage 1 reads text: qformer_config.use_qformer_text_input must be True")
        self.itg_transform = BertPredictionHeadTransform(config.qformer_config)
        self.itg_bias = nn.Parameter(torch.zeros(config.qformer_config.vocab_size))
        qformer = config.qformer_config
        device = "meta" if config.tie_word_embeddings else None  # post_init ties it to the word embeddings
        self.itg_head = TiedLinear(qformer.hidden_size, qformer.vocab_size, bias=False, device=device)
        self.temperature = nn.Parameter(torch.tensor(config.initial_temperature))

    def itg_logits(self, text_states: torch.Tensor) -> torch.Tensor:
        """Predict tokens with BERT's head, tied to the word embeddings: [B, T, D] -> [B, T, V]."""
        return self.itg_head(self.itg_transform(text_states), self.itg_bias)

    def itg_loss(self, text_states: torch.Tensor, input_ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """ITG's cross-entropy, of the states [B, T, D] that the tokens int64[B, T] have in the generating pass."""
        states, targets = text_states.flatten(0, 1), losses.itg_targets(input_ids, text_mask).flatten()
        if not torch.compiler.is_compiling():  # the vocabulary is wide: only what has a target is predicted
            places = (targets != losses.IGNORED).nonzero().squeeze(1)
            more = -len(places) % ROWS if states.device.type == "cpu" else 0  # the first one again, without a target
            targets = nn.functional.pad(targets[places], (0, more), value=losses.IGNORED)
            states = states[nn.functional.pad(places, (0, more))]
        return self.itg_head(self.itg_transform(states), self.itg_bias, targets, self.config.label_smoothing)

    def get_output_embeddings(self) -> nn.Module:
        return self.itg_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Set ITG's head; new words start with a bias of 0."""
        self.itg_head = TiedLinear(value.in_features, value.out_features, bias=False, device="meta")
        self.itg_head.weight = value.weight
        bias = self.itg_bias.data[: value.out_features]
        self.itg_bias.data = nn.functional.pad(bias, (0, value.out_features - len(bias)))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor,
        noise: torch.Tensor | None = None,
        negatives: tuple[torch.Tensor, torch.Tensor] | None = None,
        features: dict[str, torch.Tensor] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> XFormerForPreTrainingOutput:
        """The four losses of B image-text pairs.

        Args:
            pixel_values: uint8[B, 3, H, W] or float in [0, 1].
            qformer_input_ids, qformer_attention_mask: int64[B, T], [CLS] first.
            noise: [B, L] in [0, 1) for the masking; drawn if None.
            negatives: for each text an image and for each image a text, int64[B] each, indices over all processes, -1
                for none; drawn hard if None.
            features: cached outputs of `XFormerModel.frozen_features`.
            output_attentions, output_hidden_states: also return those of the pass that generates.
        """
        config = self.config
        ids, text_mask = equally_long(qformer_input_ids, qformer_attention_mask)
        mask_ratio = config.mask_ratio if config.reconstruction else 0.0
        image = self.xformer.project(self.xformer.encode_image(pixel_values, mask_ratio, noise, features))

        generation_ids = torch.cat([torch.full_like(ids[:, :1], config.text_start_token_id), ids[:, 1:]], dim=1)
        causal = masks.multimodal_causal_mask(text_mask, config.num_query_tokens)
        maps = self._maps(output_attentions, output_hidden_states)
        output = self.xformer.read(image, generation_ids, causal, **maps)
        itg = self.itg_loss(output.text_states, generation_ids, text_mask) * share(text_mask[:, 1:])

        image_features, text_features = self.image_features(output.fused_queries), self.text_features(ids, text_mask)
        image_to_text = losses.image_text_similarity(image_features, gather(text_features)) / self.temperature
        text_to_image = losses.image_text_similarity(gather(image_features), text_features).t() / self.temperature
        own = rank() * len(ids) + torch.arange(len(ids), device=ids.device)
        itc = losses.itc_loss(image_to_text, text_to_image, own, config.label_smoothing)

        if negatives is None:
            same = (ids[:, None] == gather(ids)[None]).all(-1)
            negatives = (
                losses.sample_hard_negatives(text_to_image, same),
                losses.sample_hard_negatives(image_to_text, same),
            )
        itm_logits, labels = self._match_with_negatives(image, ids, text_mask, negatives)
        exists = labels != losses.IGNORED
        itm = losses.itm_loss(itm_logits, labels) * share(exists)

        loss = config.itc_weight * itc + config.itm_weight * itm + config.itg_weight * itg
        reconstruction = None
        if config.reconstruction:
            reconstruction = self.xformer.reconstruction_loss(image, output)
            loss = loss + config.reconstruction_weight * reconstruction
        return XFormerForPreTrainingOutput(
            loss=loss,
            itc_loss=itc,
            itm_loss=itm,
            itg_loss=itg,
            reconstruction_loss=reconstruction,
            itc_accuracy=(image_to_text.argmax(-1) == own).float().mean(),
            itm_accuracy=(itm_logits.argmax(-1) == labels).sum() / exists.sum() * share(exists),
            itm_logits=itm_logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            xformer_output=output,
        )

    def _match_with_negatives(self, image, ids, text_mask, negatives) -> tuple[torch.Tensor, torch.Tensor]:
        """ITM logits and labels of (image, its text), (negative image, text), (image, negative text): [3B, 2], int64[3B].

        A negative that does not exist, as in a batch of 1, has the label IGNORED.
        """
        images, texts = (index.clamp(min=0) for index in negatives)
        missing = torch.cat(negatives) < 0
        own = dataclasses.replace(image, pixels=None, clip_states=None)
        others = own.select(images) if world_size() == 1 else self.xformer.of_all_processes(image, images)
        logits, _ = self.match(
            own.followed_by(others, own),
            torch.cat([ids, ids, gather(ids)[texts]]),
            torch.cat([text_mask, text_mask, gather(text_mask)[texts]]),
        )
        labels = torch.cat([torch.ones_like(images), torch.zeros_like(missing, dtype=torch.long)])
        labels[len(images) :].masked_fill_(missing, losses.IGNORED)
        return logits, labels

    @torch.no_grad()
    def caption(self, pixel_values: torch.Tensor, end_token_id: int, max_new_tokens: int = 20) -> torch.Tensor:
        """Caption B images greedily with the ITG head -> int64[B, <=max_new_tokens] of the Q-Former's tokenizer.

        A row that has ended is padded with the end token.
        """
        image = self.xformer.project(self.xformer.encode_image(pixel_values))
        start = torch.full((len(pixel_values), 1), self.config.text_start_token_id, device=pixel_values.device)
        ids, ended = start, torch.zeros_like(start, dtype=torch.bool)
        for _ in range(max_new_tokens):
            mask = masks.multimodal_causal_mask(torch.ones_like(ids), self.config.num_query_tokens)
            states = self.xformer.read(image, ids, mask).text_states
            following = self.itg_logits(states[:, -1:]).argmax(-1).masked_fill(ended, end_token_id)
            ids, ended = torch.cat([ids, following], dim=1), ended | (following == end_token_id)
            if ended.all():
                break
        return ids[:, 1:]


class XFormerForConditionalGeneration(XFormerPreTrainedModel, GenerationMixin):
    """Stage 2 and inference: projection(Z') is a soft prompt at the image placeholders of a frozen language model.

    The language model is a decoder, or an encoder-decoder whose encoder reads the soft prompt and the text (BLIP-2's
    FlanT5). Its LoRA adapters (`config.lora_rank`) are part of it, and are saved with the rest.
    """

    def __init__(self, config: XFormerConfig):
        super().__init__(config)
        if config.text_config is None:
            raise ValueError("stage 2 needs a language model: text_config is None")
        without_dropout(config.text_config)
        self.xformer = XFormerModel(config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_model = language_model_class(config.text_config).from_config(config.text_config)
        trained = [*TRAINED, "^language_projection", *(TRAINED_ADAPTERS if config.lora_rank else [])]
        self._keep_in_fp32_modules_strict, self._keep_in_fp32_modules = trained, _also(trained)
        self.post_init()
        if config.lora_rank:
            add_lora(self.language_model, config.lora_rank)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, dtype=None, config=None, **kwargs):
        """Load as transformers does; the frozen parts in the dtype of the saved language model unless `dtype` is given."""
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype  # its name before transformers 5
        if dtype is None:
            config = config or cls.config_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
            if config.text_config is None:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: a model of stage 1 has no language model to generate with; "
                    "load it as XFormerForPreTraining, or add one with `xformer train stage2`"
                )
            dtype = config.text_config.dtype or "auto"
        return super().from_pretrained(pretrained_model_name_or_path, *args, dtype=dtype, config=config, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.language_model.get_encoder() if modality is None else super().get_encoder(modality=modality)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        features: dict[str, torch.Tensor] | None = None,
    ) -> XFormerImageFeaturesOutput:
        """Encode images for the language model: pixels of B images -> `pooler_output`, the soft prompts [texts, Q, E].

        Arguments as in `forward`; attention maps and hidden states, on request, are the Q-Former's.
        """
        image = self.xformer.encode_image(pixel_values, features=features)
        self._check_texts(len(image.clip_tokens), image_index, None, qformer_input_ids)
        maps = self._maps(output_attentions, output_hidden_states)
        output = self._read(image, image_index, qformer_input_ids, qformer_attention_mask, **maps)
        return XFormerImageFeaturesOutput(
            last_hidden_state=output.clip_tokens,
            pooler_output=self._soft_prompt(output, image_index),
            attentions=output.attentions,
            hidden_states=output.hidden_states,
            xformer_output=output,
        )

    def _check_texts(self, images: int, image_index, input_ids, qformer_input_ids) -> None:
        """Check that each text [texts, T] has its image: as many texts as images, or an `image_index`."""
        index = None if image_index is None else torch.as_tensor(image_index)
        read = qformer_input_ids if self.config.instruction_aware else None
        for count in [len(ids) for ids in (input_ids, read) if ids is not None]:
            if index is None and count != images:
                raise ValueError(
                    f"{_counted(images, 'image')}, {_counted(count, 'text')}: pass as many texts as images, "
                    "or image_index=[the image of each text]"
                )
            if index is not None and count != len(index):
                raise ValueError(
                    f"image_index names {_counted(len(index), 'image')} for {_counted(count, 'text')}; pass one per text"
                )

    def _read(self, image: ImageTokens, image_index, input_ids, attention_mask, **maps: bool) -> XFormerModelOutput:
        """Let the queries read each image; in an instruction-aware model each text's image together with its prompt."""
        if not self.config.instruction_aware:
            return self.xformer.read(image, **maps)
        if input_ids is None:
            raise ValueError(
                "this model's queries read the prompt: pass qformer_input_ids, which XFormerProcessor returns for a text"
            )
        if image_index is not None:
            image = image.select(image_index)
        mask = masks.bidirectional_mask(attention_mask, self.config.num_query_tokens)
        return self.xformer.read(image, input_ids, mask, queries_only=True, **maps)

    def _soft_prompt(self, output: XFormerModelOutput, image_index: torch.Tensor | None) -> torch.Tensor:
        """Project Z' for each text: -> [texts, Q, E]."""
        soft_prompt = self.language_projection(output.fused_queries)
        shared = image_index is not None and not self.config.instruction_aware
        return soft_prompt[image_index] if shared else soft_prompt

    def _with_soft_prompt(self, input_ids: torch.Tensor, soft_prompt: torch.Tensor) -> torch.Tensor:
        """Embed int64[B, T], with the soft prompt [B, Q, E] at the image placeholders -> [B, T, E]."""
        if len(input_ids) != len(soft_prompt):
            raise ValueError(
                f"{_counted(len(soft_prompt), 'soft prompt')} for {_counted(len(input_ids), 'text')}; pass one for each text"
            )
        at = input_ids == self.config.image_token_index
        if not torch.compiler.is_compiling() and not (at.sum(-1) == soft_prompt.shape[1]).all():
            raise ValueError(
                f"every text needs {soft_prompt.shape[1]} image placeholders (token {self.config.image_token_index}), "
                f"found {at.sum(-1).tolist()}; XFormerProcessor inserts them"
            )
        embeds = self.get_input_embeddings()(input_ids.masked_fill(at, 0))
        return embeds.masked_scatter(at.unsqueeze(-1), soft_prompt.to(embeds.dtype))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        soft_prompt: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        features: dict[str, torch.Tensor] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> XFormerForConditionalGenerationOutput:
        """Compute the language-modelling loss of texts after images (paper section "Stage 2").

        Args:
            pixel_values: uint8[B, 3, H, W] or float in [0, 1].
            input_ids: int64[B, T] with the image placeholders in it, from `XFormerProcessor`.
            attention_mask: [B, T], 1 = token.
            labels: int64[B, T], -100 at positions without loss; no loss if None. For an encoder-decoder, the target text of
                the decoder, int64[B, T'].
            noise: [B, L] for the masking of the variant that keeps the reconstruction loss.
            soft_prompt: [texts, Q, E] from `get_image_features`, instead of `pixel_values`.
            image_index: int64[texts], the image of each text, where an image has several; by default text i has image i.
            qformer_input_ids, qformer_attention_mask: int64[texts, T''], the prompts for an instruction-aware Q-Former.
            decoder_input_ids: int64[B, T'], input of an encoder-decoder's decoder, where there are no labels.
            features: cached outputs of `XFormerModel.frozen_features`.
            output_attentions, output_hidden_states: also return the language model's.

        Returns:
            `logits` [B, T, V] without labels and in evaluation mode; in training with labels they are not computed for
            every position, and None.

        Raises:
            ValueError: if a text does not have exactly one image and as many placeholders as there are queries.
        """
        config, output, image = self.config, None, None
        reconstructs = config.reconstruction_in_stage2 and labels is not None
        if soft_prompt is None:
            mask_ratio = config.mask_ratio if reconstructs else 0.0
            image = self.xformer.encode_image(pixel_values, mask_ratio, noise, features)
            self._check_texts(len(image.clip_tokens), image_index, input_ids, qformer_input_ids)
            output = self._read(image, image_index, qformer_input_ids, qformer_attention_mask)
            soft_prompt = self._soft_prompt(output, image_index)
        inputs = {
            "inputs_embeds": self._with_soft_prompt(input_ids, soft_prompt),
            "attention_mask": attention_mask,
            **self._maps(output_attentions, output_hidden_states),
        }
        if labels is None:
            inputs |= {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
            predicted, targets = self.language_model(**inputs), None
        else:
            predicted, targets = self._predict(inputs, labels)
        found = XFormerForConditionalGenerationOutput(
            logits=None if self.training and labels is not None else predicted.logits,
            hidden_states=predicted.get("hidden_states", predicted.get("decoder_hidden_states")),
            attentions=predicted.get("attentions", predicted.get("decoder_attentions")),
            xformer_output=output,
        )
        if targets is None:
            return found
        logits = predicted.logits
        lm = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) * share(targets != -100)
        found.loss = found.lm_loss = lm
        if reconstructs:
            if config.instruction_aware and image_index is not None:
                image = image.select(image_index)
            found.reconstruction_loss = self.xformer.reconstruction_loss(image, output)
            found.loss = lm + config.reconstruction_weight * found.reconstruction_loss
        return found

    def _predict(self, inputs: dict, labels: torch.Tensor) -> tuple[ModelOutput, torch.Tensor]:
        """The language model's output, with logits [texts, columns, V], and their targets, -100 at those without loss."""
        if self.config.text_config.is_encoder_decoder:
            ids = self.language_model.prepare_decoder_input_ids_from_labels(labels)
            return self.language_model(**inputs, decoder_input_ids=ids), labels
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if not self.training or torch.compiler.is_compiling():
            return self.language_model(**inputs), targets
        # The vocabulary is by far the widest layer: in training, only columns that have a target are computed.
        columns = (targets != -100).any(0).nonzero().squeeze(1)
        return self.language_model(**inputs, logits_to_keep=columns), targets[:, columns]

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        soft_prompt: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        features: dict[str, torch.Tensor] | None = None,
        **generate_kwargs,
    ) -> torch.Tensor:
        """Continue texts after images, with the arguments of `forward` and of the language model's `generate`.

        Pad on the left for a decoder, on the right for an encoder-decoder. Without `input_ids` the text is empty.

        Returns:
            As `Blip2ForConditionalGeneration.generate`: a decoder's `input_ids` with their placeholders, then new tokens;
            an encoder-decoder's start token, then new ones. The prompt does not count for penalties on repetition.
        """
        if soft_prompt is None:
            if not features:
                check_pixels(pixel_values)
            images = len(features["clip"] if features else pixel_values)
            self._check_texts(images, image_index, input_ids, qformer_input_ids)
            _check_range(image_index, images)
            soft_prompt = self.get_image_features(
                pixel_values,
                image_index,
                qformer_input_ids,
                qformer_attention_mask,
                features=features,
                return_dict=True,
            ).pooler_output
        if input_ids is None:
            input_ids = torch.tensor(self._empty_text(), device=soft_prompt.device).expand(len(soft_prompt), -1)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if generate_kwargs.get("assistant_model") is not None or generate_kwargs.get("prompt_lookup_num_tokens"):
            raise ValueError("assisted generation needs a prompt of tokens, and an image is none; omit the assistant")
        settings = copy.deepcopy(generate_kwargs.pop("generation_config", None) or self.generation_config)
        others = settings.update(**generate_kwargs)  # streamer, logits_processor, ...
        output = self.language_model.generate(
            inputs_embeds=self._with_soft_prompt(input_ids, soft_prompt),
            attention_mask=attention_mask,
            generation_config=settings,
            **others,
        )
        if self.config.text_config.is_encoder_decoder:
            return output
        tokens = output if torch.is_tensor(output) else output.sequences
        prompts = input_ids.to(tokens.device).repeat_interleave(len(tokens) // len(input_ids), dim=0)
        sequences = torch.cat([prompts, tokens], dim=1)
        if torch.is_tensor(output):
            return sequences
        output.sequences = sequences
        return output

    def _empty_text(self) -> list[int]:
        """Tokens of an empty prompt: placeholders, then the start token, or an encoder's end token, if there is one."""
        settings = self.generation_config
        token = settings.eos_token_id if self.config.text_config.is_encoder_decoder else settings.bos_token_id
        text = [] if token is None else token if isinstance(token, list) else [token]
        return [self.config.image_token_index] * self.config.num_query_tokens + text[:1]


__all__ = [
    "XFormerForConditionalGeneration",
    "XFormerForImageTextRetrieval",
    "XFormerForPreTraining",
    "XFormerModel",
    "XFormerPreTrainedModel",
    "add_lora",
    "language_model_class",
    "without_dropout",
]
