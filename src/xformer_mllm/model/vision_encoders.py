"""Pixels -> tokens, through transformers' own frozen encoders.

`B` batch, `N` CLIP tokens, `L` MAE patches, `K` kept MAE patches, `D` width.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Blip2VisionModel, Siglip2VisionModel, ViTMAEModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from .configuration_xformer import XFormerConfig
from .distributed import gather
from .qformer import KeysValues
from .reconstruction import patchify

ROUNDING = 0.01  # tolerance around [0, 1]: undoing a normalisation in bfloat16 is off by as much


def check_pixels(pixel_values: torch.Tensor | None) -> None:
    """Check that pixels are uint8[B, 3, H, W], or float[B, 3, H, W] in [0, 1]: towers accept others without an error.

    The values of floats are checked, which waits for a GPU; the processor returns uint8.

    Raises:
        ValueError: if they are not.
    """
    if pixel_values is None:
        raise ValueError("pass pixel_values, which XFormerProcessor returns for images")
    fits = torch.is_tensor(pixel_values) and pixel_values.ndim == 4 and pixel_values.shape[1] == 3
    fits = fits and pixel_values.numel() > 0
    if fits and pixel_values.dtype == torch.uint8:
        return
    found = type(pixel_values).__name__
    if torch.is_tensor(pixel_values):
        found = f"{str(pixel_values.dtype).removeprefix('torch.')}{list(pixel_values.shape)}"
    if fits and pixel_values.is_floating_point():
        if torch.compiler.is_compiling():  # values are not known
            return
        low, high = (bound.item() for bound in pixel_values.aminmax())
        if low >= -ROUNDING and high <= 1 + ROUNDING:
            return
        found += f" from {low:.2f} to {high:.2f}, perhaps already normalised"
        found += "; X-Former normalises them for each encoder"
    raise ValueError(
        f"pixel_values must be uint8[B, 3, H, W] or floats in [0, 1], as XFormerProcessor returns them, not {found}"
    )


def scaled(pixel_values: torch.Tensor, image_size: int, mean: list, std: list, dtype: torch.dtype) -> torch.Tensor:
    """Resize and normalise pixels for one encoder.

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
    """Build a randomly initialised vision tower: any that AutoModel knows, or BLIP-2's EVA-CLIP."""
    if config.model_type == Blip2VisionModel.config_class.model_type:
        return Blip2VisionModel._from_config(config)
    tower = AutoModel.from_config(config)
    return without_masking(tower) if isinstance(tower, ViTMAEModel) else tower


def without_masking(encoder: ViTMAEModel) -> ViTMAEModel:
    """Let a MAE's embeddings keep all patches, in place: `encode_mae` masks them, with a ratio per call."""
    encoder.embeddings.config = copy.deepcopy(encoder.config)
    encoder.embeddings.config.mask_ratio = 0.0
    return encoder


def is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def dtype_of(module: nn.Module) -> torch.dtype:
    """Dtype of a module's first floating-point parameter: quantised weights are integers."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


class ClipEncoder(nn.Module):
    """Hidden states of chosen layers of a contrastive tower, in one pass.

    The tower's own final norm and pooling are not used: BLIP-2 puts a trainable layer norm on the raw hidden states.
    Layers after the last one that is used are neither built nor run.
    """

    def __init__(self, config: PreTrainedConfig, layers: list[int]):
        super().__init__()
        self.tower = build_tower(config)
        self.read_layers = [layer % config.num_hidden_layers for layer in layers]
        stack = self._stack(config.num_hidden_layers)
        del stack[max(self.read_layers) + 1 :]
        # CLIP's and SigLIP's layers require a mask, BLIP-2's do not take one.
        takes_mask = "attention_mask" in inspect.signature(stack[0].forward).parameters
        self.layer_arguments = {"attention_mask": None} if takes_mask else {}

    def _stack(self, depth: int) -> nn.ModuleList:
        for module in self.tower.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise ValueError(f"{type(self.tower).__name__} has no list of {depth} layers, so it cannot be the CLIP tower")

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Encode normalised pixels [B, 3, H, W] -> [B, N, D] for each requested layer, CLS first if the tower has one."""
        tower: Any = self.tower
        states = tower.embeddings(pixels)
        if hasattr(tower, "pre_layrnorm"):  # CLIP's, as transformers spells it
            states = tower.pre_layrnorm(states)
        read = {}
        for index, layer in enumerate(self._stack(max(self.read_layers) + 1)):
            states = layer(states, **self.layer_arguments)
            if index in self.read_layers:
                read[index] = states
        return [read[index] for index in self.read_layers]


def mae_positions(patches: int, width: int) -> torch.Tensor:
    """The MAE's fixed sine-cosine positions, with a zero row for CLS first: [1, 1+L, D].

    The columns' half comes before the rows', as in facebookresearch/mae, whose weights rely on it.
    """
    side = round(patches**0.5)
    positions = build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True)
    rows, columns = positions.chunk(2, dim=-1)
    return torch.cat([columns, rows], dim=-1)[None]


@dataclass
class MaeTokens:
    """Tokens M of the second encoder. Only a MAE masks patches.

    tokens: [B, 1+K, D], CLS first, then the kept patches in the order of the shuffle (row order if none is masked).
    mask: [B, L], 1 = masked (removed), 0 = kept.
    ids_restore: int64[B, L], position of each patch in the shuffled sequence (kept first, then masked).
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    ids_restore: torch.Tensor


@dataclass
class ImageTokens:
    """C and M of a batch of images, encoded once.

    pixels: the MAE's normalised input, the target of reconstruction.
    keys_values: the Q-Former's, projected once, where an image is read several times.
    mae_queries: M's in the fusion, [B, 1+K, D_m], likewise.
    """

    clip_tokens: torch.Tensor
    mae: MaeTokens | None
    pixels: torch.Tensor | None
    keys_values: KeysValues | None = None
    mae_queries: torch.Tensor | None = None

    def map(self, change: Callable[..., torch.Tensor], *others: "ImageTokens") -> "ImageTokens":
        """Apply a function to every tensor, together with the same one of `others`."""
        return _map(change, self, *others)

    def select(self, index: torch.Tensor) -> "ImageTokens":
        """Select images: int64[P], each in [0, B)."""
        return self.map(lambda tensor: tensor[index])

    def followed_by(self, *others: "ImageTokens") -> "ImageTokens":
        """Images one after the other; `others` have the same fields."""
        return self.map(lambda *tensors: torch.cat(tensors), *others)

    def gathered(self) -> "ImageTokens":
        """C and M of the images of all processes, without what is projected: it is wider, and few of them are read."""
        return ImageTokens(self.clip_tokens, self.mae, None).map(gather)

    def to(self, *args, **kwargs) -> "ImageTokens":
        """Move every tensor to another device."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))


def _map(change: Callable[..., torch.Tensor], *nodes: Any) -> Any:
    """Apply a function to the corresponding tensors of equal structures."""
    if nodes[0] is None:
        return None
    if torch.is_tensor(nodes[0]):
        return change(*nodes)
    if isinstance(nodes[0], tuple):
        return tuple(_map(change, *parts) for parts in zip(*nodes, strict=True))
    parts = zip(*(vars(node).values() for node in nodes), strict=True)
    return type(nodes[0])(*(_map(change, *part) for part in parts))


def encode_mae(
    encoder: ViTMAEModel, pixels: torch.Tensor, mask_ratio: float = 0.0, noise: torch.Tensor | None = None
) -> MaeTokens:
    """Run transformers' `ViTMAEModel` with a mask ratio per call; a ratio of 0 does not shuffle.

    transformers reads the ratio from the configuration only, and shuffles the patches even when it keeps all of them.
    The masking is the MAE's (facebookresearch/mae models_mae.py `random_masking`): the int(L * (1 - ratio)) patches with
    the lowest noise are kept.

    Args:
        encoder: a `ViTMAEModel` from `without_masking`.
        pixels: normalised, [B, 3, H, W].
        mask_ratio: share of the patches to remove, in [0, 1).
        noise: [B, L] in [0, 1); drawn if None.
    """
    batch, length = pixels.shape[0], encoder.embeddings.patch_embeddings.num_patches
    in_order = torch.arange(length, dtype=torch.float32, device=pixels.device).expand(batch, -1)
    states, _, _ = encoder.embeddings(pixels, noise=in_order)
    if mask_ratio == 0.0:
        ids_shuffle = in_order.argsort(dim=1)
    else:
        noise = torch.rand(batch, length, device=pixels.device) if noise is None else noise.to(pixels.device)
        ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept = int(length * (1 - mask_ratio))
    places = ids_shuffle[:, :kept, None].expand(-1, -1, states.shape[2])
    states = torch.cat([states[:, :1], states[:, 1:].gather(1, places)], dim=1)
    for layer in encoder.layers:
        states = layer(states)
    return MaeTokens(encoder.layernorm(states), (ids_restore >= kept).to(pixels.dtype), ids_restore)


def tower_tokens(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Run a tower that is not a MAE: normalised pixels [B, 3, H, W] -> its last hidden state [B, N, D], CLS first if any.

    Register tokens are dropped, as DINO's authors do.
    """
    if isinstance(tower, Siglip2VisionModel):  # NaFlex takes patches, their padding mask, and rows and columns
        patches = patchify(pixels, tower.config.patch_size)
        shape = pixels.new_tensor([size // tower.config.patch_size for size in pixels.shape[-2:]], dtype=torch.long)
        every = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
        return tower(patches, every, shape.expand(len(patches), -1)).last_hidden_state
    states = tower(pixels).last_hidden_state
    registers = getattr(tower.config, "num_register_tokens", 0)
    return torch.cat([states[:, :1], states[:, 1 + registers :]], dim=1) if registers else states


def unmasked(tokens: torch.Tensor) -> MaeTokens:
    """Wrap M [B, N, D] of an encoder that is not a MAE."""
    mask = tokens.new_zeros(tokens.shape[:2])
    return MaeTokens(tokens, mask, mask.long())


def encode_second(
    encoder: nn.Module,
    config: XFormerConfig,
    pixel_values: torch.Tensor,
    mask_ratio: float = 0.0,
    noise: torch.Tensor | None = None,
) -> tuple[MaeTokens, torch.Tensor]:
    """Encode uint8[B, 3, H, W] (or float in [0, 1]) -> M, and the normalised pixels that the second encoder was given.

    Raises:
        ValueError: if a mask ratio is given and the encoder is not a MAE.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(encoder)):
        dtype = dtype_of(encoder)
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
    "dtype_of",
    "encode_mae",
    "encode_second",
    "is_frozen",
    "mae_positions",
    "scaled",
    "unmasked",
    "without_masking",
]
