"""M' -> pixels through the frozen MAE decoder, and the masked loss (facebookresearch/mae models_mae.py).

`B` batch, `L` patches, `P` values of a patch (patch size squared times 3, in the order row, column, channel).
"""

import torch


def patchify(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into patches: [B, 3, H, W] -> [B, L, P]."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixels.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Invert `patchify` for square images: [B, L, P] -> [B, 3, H, W]."""
    batch, length, values = patches.shape
    side, channels = round(length**0.5), values // patch_size**2
    pixels = patches.reshape(batch, side, side, patch_size, patch_size, channels)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch_size, side * patch_size)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each patch, [B, L, 1] each, as MAE's `norm_pix_loss` has them (unbiased, + 1e-6)."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(
    prediction: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor, patch_size: int, normalise: bool
) -> torch.Tensor:
    """Mean squared error on the masked patches only, in fp32 (paper section "Stage 1", reconstruction).

    Args:
        prediction: the decoder's [B, L, P].
        pixels: normalised as the MAE's input, [B, 3, H, W].
        mask: [B, L], 1 = masked.
        patch_size: of the MAE.
        normalise: whether the decoder predicts normalised patches (MAE's `norm_pix_loss`).
    """
    target = patchify(pixels.float(), patch_size)
    if normalise:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    error = (prediction.float() - target).square().mean(-1)
    return (error * mask.float()).sum() / mask.float().sum()


__all__ = ["patch_statistics", "patchify", "reconstruction_loss", "unpatchify"]
