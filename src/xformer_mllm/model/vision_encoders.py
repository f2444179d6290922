"""Pixels -> tokens, through transformers' own frozen encoders.

`B` batch, `N` CLIP tokens, `L` MAE patches, `K` kept MAE patches, `D` width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, Blip2VisionModel, Siglip2VisionModel, ViTMAEModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from .configuration_xformer import XFormerConfig
from .distributed import gather
from .reconstruction import patchify

ROUNDING = 0.01  # by which floats may lie outside of [0, 1]: a normalisation undone in bfloat16 is off by as much


def check_pixels(pixel_values: torch.Tensor | None) -> None:
    """Refuse what is not uint8[B, 3, H, W] or float[B, 3, H, W] in [0, 1]: a tower would answer to it, but wrongly.

    Of floats alone are the values looked at, which waits for a GPU; the processor makes bytes.

    Raises:
        ValueError: in one line.
    """
    if pixel_values is None:
        raise ValueError("give pixel_values, as XFormerProcessor makes them of images")
    fits = torch.is_tensor(pixel_values) and pixel_values.ndim == 4 and pixel_values.shape[1] == 3
    fits = fits and pixel_values.numel() > 0
    if fits and pixel_values.dtype == torch.uint8:
        return
    found = type(pixel_values).__name__
    if torch.is_tensor(pixel_values):
        found = f"{str(pixel_values.dtype).removeprefix('torch.')}{list(pixel_values.shape)}"
    if fits and pixel_values.is_floating_point():
        low, high = (bound.item() for bound in pixel_values.aminmax())
        if low >= -ROUNDING and high <= 1 + ROUNDING:
            return
        found += f" from {low:.2f} to {high:.2f}, perhaps already normalised"
        found += ": X-Former normalises by itself, for each encoder"
    raise ValueError(
        f"pixel_values must be uint8[B, 3, H, W] or floats in [0, 1], as XFormerProcessor makes them; here {found}"
    )


def scaled(pixel_values: torch.Tensor, image_size: int, mean: list, std: list, dtype: torch.dtype) -> torch.Tensor:
    """One image tensor -> what one encoder was trained on: its resolution, its mean and deviation.

    Args:
        pixel_values: uint8[B, 3, H, W], or float in [0, 1].
        image_size: the encoder's; other sizes are resized (bicubic, antialiased).
        mean, std: the encoder's three channel statistics, of pixels in [0, 1].
        dtype: of the result.
    """
    pixels = pixel_values.float() / 255 if pixel_values.dtype == torch.uint8 else pixel_values.float()
    if pixels.shape[-2:] != (image_size, image_size):
        pixels = nn.functional.interpolate(
            pixels, size=(image_size, image_size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
    mean_, std_ = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (mean, std))
    return ((pixels - mean_) / std_).to(dtype)


def build_tower(config: PreTrainedConfig) -> nn.Module:
    """A randomly initialised vision tower: any that AutoModel knows, or BLIP-2's EVA-CLIP."""
    if config.model_type == Blip2VisionModel.config_class.model_type:
        return Blip2VisionModel._from_config(config)
    return AutoModel.from_config(config)


def is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


class ClipEncoder(nn.Module):
    """Hidden states of chosen layers of a contrastive tower, in one pass.

    The tower's own final norm and pooling are not used: BLIP-2 puts a trainable layer norm on the raw hidden states.
    Layers behind the last one that is read are neither built nor run.
    """

    def __init__(self, config: PreTrainedConfig, layers: list[int]):
        super().__init__()
        self.tower = build_tower(config)
        self.read_layers = [layer % config.num_hidden_layers for layer in layers]
        stack = self._stack(config.num_hidden_layers)
        del stack[max(self.read_layers) + 1 :]

    def _stack(self, depth: int) -> nn.ModuleList:
        for module in self.tower.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise ValueError(f"{type(self.tower).__name__} has no list of {depth} layers; it cannot be the CLIP tower")

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Normalised pixels [B, 3, H, W] -> one [B, N, D] per asked layer, CLS token first where the tower has one."""
        states: dict[int, torch.Tensor] = {}

        def keep(index: int):
            def hook(_module, _inputs, output):
                states[index] = output[0] if isinstance(output, tuple) else output

            return hook

        stack = self._stack(max(self.read_layers) + 1)
        hooks = [stack[index].register_forward_hook(keep(index)) for index in set(self.read_layers)]
        try:
            self.tower(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return [states[index] for index in self.read_layers]


def mae_positions(patches: int, width: int) -> torch.Tensor:
    """The MAE's fixed sine-cosine positions, a zero row for CLS first: [1, 1+L, D].

    facebookresearch/mae puts the columns' half before the rows'; pretrained weights rely on it.
    """
    side = round(patches**0.5)
    positions = build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True)
    rows, columns = positions.chunk(2, dim=-1)
    return torch.cat([columns, rows], dim=-1)[None]


@dataclass
class MaeTokens:
    """What the second encoder saw. Of a tower that is no MAE, nothing is masked.

    tokens: [B, 1+K, D], CLS first, then the kept patches in the order of the shuffle (row order if none is masked).
    mask: [B, L], 1 = masked (removed), 0 = kept.
    ids_restore: int64[B, L], position of each patch in the shuffled sequence (kept first, masked behind).
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    ids_restore: torch.Tensor


@dataclass
class ImageTokens:
    """C and M of a batch of images, encoded once. `pixels`: the MAE's normalised input, what it must reconstruct."""

    clip_tokens: torch.Tensor
    mae: MaeTokens | None
    pixels: torch.Tensor | None

    def select(self, index: torch.Tensor) -> "ImageTokens":
        """The same for a choice of the images: int64[P], each in [0, B)."""
        mae = None if self.mae is None else MaeTokens(*(t[index] for t in vars(self.mae).values()))
        return ImageTokens(self.clip_tokens[index], mae, None if self.pixels is None else self.pixels[index])

    def gathered(self) -> "ImageTokens":
        """The images of all processes."""
        mae = None if self.mae is None else MaeTokens(*(gather(t) for t in vars(self.mae).values()))
        return ImageTokens(gather(self.clip_tokens), mae, None)


def encode_mae(
    encoder: ViTMAEModel, pixels: torch.Tensor, mask_ratio: float = 0.0, noise: torch.Tensor | None = None
) -> MaeTokens:
    """transformers' `ViTMAEModel` with a mask ratio per call; a ratio of 0 does not shuffle.

    transformers takes the ratio from the configuration alone and shuffles the patches even when it keeps them all.
    The masking is the MAE's (facebookresearch/mae models_mae.py `random_masking`): the int(L * (1 - ratio)) patches with
    the lowest noise are kept.

    Args:
        encoder: a `ViTMAEModel`.
        pixels: normalised, [B, 3, H, W].
        mask_ratio: share of the patches to remove, in [0, 1).
        noise: [B, L] in [0, 1); drawn if None.
    """
    embeddings = encoder.embeddings
    patches = embeddings.patch_embeddings(pixels) + embeddings.position_embeddings[:, 1:]
    batch, length, width = patches.shape
    if mask_ratio == 0.0:
        ids_shuffle = torch.arange(length, device=pixels.device).expand(batch, -1)
    else:
        noise = torch.rand(batch, length, device=pixels.device) if noise is None else noise.to(pixels.device)
        ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept = int(length * (1 - mask_ratio))
    patches = patches.gather(1, ids_shuffle[:, :kept, None].expand(-1, -1, width))
    cls_token = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(batch, -1, -1)

    states = torch.cat([cls_token, patches], dim=1)
    for layer in encoder.layers:
        states = layer(states)
    return MaeTokens(encoder.layernorm(states), (ids_restore >= kept).to(pixels.dtype), ids_restore)


def tower_tokens(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Any tower but a MAE: normalised pixels [B, 3, H, W] -> its last hidden state [B, N, D], CLS first where it has one.

    Registers are left out: DINO's authors throw them away as well.
    """
    if isinstance(
        tower, Siglip2VisionModel
    ):  # NaFlex takes patches, which of them are no padding, and their rows, columns
        patches = patchify(pixels, tower.config.patch_size)
        shape = pixels.new_tensor([size // tower.config.patch_size for size in pixels.shape[-2:]], dtype=torch.long)
        every = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
        return tower(patches, every, shape.expand(len(patches), -1)).last_hidden_state
    states = tower(pixels).last_hidden_state
    registers = getattr(tower.config, "num_register_tokens", 0)
    return torch.cat([states[:, :1], states[:, 1 + registers :]], dim=1) if registers else states


def unmasked(tokens: torch.Tensor) -> MaeTokens:
    """M [B, N, D] that comes from no MAE."""
    mask = tokens.new_zeros(tokens.shape[:2])
    return MaeTokens(tokens, mask, mask.long())


def encode_second(
    encoder: nn.Module,
    config: XFormerConfig,
    pixel_values: torch.Tensor,
    mask_ratio: float = 0.0,
    noise: torch.Tensor | None = None,
) -> tuple[MaeTokens, torch.Tensor]:
    """uint8[B, 3, H, W] (or float in [0, 1]) -> M by the second encoder, and the normalised pixels that it was given.

    Raises:
        ValueError: if something is to be masked for an encoder that is no MAE.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(encoder)):
        dtype = next(encoder.parameters()).dtype
        pixels = scaled(pixel_values, config.mae_image_size, config.mae_mean, config.mae_std, dtype)
        if config.has_mae:
            return encode_mae(encoder, pixels, mask_ratio, noise), pixels
        if mask_ratio:
            raise ValueError(f"mask_ratio is {mask_ratio}, but a {config.mae_config.model_type} cannot be masked")
        return unmasked(tower_tokens(encoder, pixels)), pixels


__all__ = [
    "ClipEncoder",
    "ImageTokens",
    "MaeTokens",
    "build_tower",
    "check_pixels",
    "encode_mae",
    "encode_second",
    "is_frozen",
    "mae_positions",
    "scaled",
    "unmasked",
]
