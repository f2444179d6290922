"""Reconstruct masked images with the MAE alone and with X-Former, and draw the results as a grid of panels."""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from xformer_mllm.model.reconstruction import patch_statistics, patchify, unpatchify

PANEL_PIXELS = 192  # panels are enlarged to about this width
MASKED_GREY = 0.5


def reconstructions(model: Any, pixel_values: torch.Tensor, mask_ratio: float, seed: int) -> dict[str, torch.Tensor]:
    """{"original", "masked", "MAE", "X-Former", "hidden"}: float[B, 3, S, S] in [0, 1], in the MAE's resolution.

    Only hidden patches are reconstructed. If the decoder predicts normalised patches (`norm_pix_loss`), they are
    scaled with the mean and standard deviation of the original patches.

    Args:
        model: an X-Former with a MAE decoder (`model.xformer.mae_decoder`).
        pixel_values: as in the model's forward.
        mask_ratio: share of the patches to hide, in (0, 1).
        seed: chooses the hidden patches, which are the same in every image.
    """
    base, config = model.xformer, model.config
    size, patches = config.mae_config.patch_size, base.mae_encoder.embeddings.patch_embeddings.num_patches
    noise = torch.rand(1, patches, generator=torch.Generator().manual_seed(seed)).expand(len(pixel_values), -1)
    image = base.encode_image(pixel_values, mask_ratio, noise.to(pixel_values.device))
    output = base.read(image)
    hidden = output.mae_mask[..., None].float()  # [B, L, 1]
    original = patchify(image.pixels.float(), size)  # [B, L, P]
    reconstructed = {
        "MAE": base.reconstruct(replace(output, enriched_mae_tokens=output.mae_tokens)).float(),
        "X-Former": base.reconstruct(output).float(),
    }
    if config.mae_config.norm_pix_loss:
        mean, deviation = patch_statistics(original)
        reconstructed = {label: prediction * deviation + mean for label, prediction in reconstructed.items()}
    mean, std = (
        torch.tensor(values, device=original.device).view(1, 3, 1, 1) for values in (config.mae_mean, config.mae_std)
    )

    def blend(prediction: torch.Tensor) -> torch.Tensor:
        return (unpatchify(prediction * hidden + original * (1 - hidden), size) * std + mean).clamp(0, 1)

    hidden_pixels = unpatchify(hidden.expand_as(original), size)
    unmasked = blend(original)
    masked = unmasked * (1 - hidden_pixels) + MASKED_GREY * hidden_pixels
    return {
        "original": unmasked,
        "masked": masked,
        **{label: blend(prediction) for label, prediction in reconstructed.items()},
        "hidden": hidden_pixels,
    }


def to_panels(images: dict[str, torch.Tensor]) -> list[dict[str, Image.Image]]:
    """{label: float[B, 3, S, S] in [0, 1]} -> for each image {label: panel}."""
    return [
        {label: _to_image(batch[index]) for label, batch in images.items()} for index in range(len(images["original"]))
    ]


def panel_grid(rows: list[dict[str, Image.Image]]) -> Image.Image:
    """One row per image and one labelled column per panel, enlarged without smoothing."""
    size = rows[0]["original"].width
    size *= max(1, round(PANEL_PIXELS / size))
    gap, header, font = 8, 28, ImageFont.load_default(size=16)
    grid = Image.new("RGB", (gap + len(rows[0]) * (size + gap), header + len(rows) * (size + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(rows[0]):
        draw.text((gap + column * (size + gap), gap // 2), label, fill="black", font=font)
    for row, images in enumerate(rows):
        for column, image in enumerate(images.values()):
            enlarged = image.resize((size, size), Image.Resampling.NEAREST)
            grid.paste(enlarged, (gap + column * (size + gap), header + row * (size + gap)))
    return grid


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """float[3, S, S] in [0, 1] -> RGB."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy())
