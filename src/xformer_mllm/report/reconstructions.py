"""Images with half of their patches hidden, and what the MAE and X-Former paint there: tensors -> a sheet of panels."""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from xformer_mllm.model.reconstruction import patch_statistics, patchify, unpatchify

PANEL_PIXELS = 192  # panels are enlarged to about this width
MASKED_GREY = 0.5


def reconstructions(model: Any, pixel_values: torch.Tensor, mask_ratio: float, seed: int) -> dict[str, torch.Tensor]:
    """{"original", "masked", "MAE", "X-Former", "hidden"}: float[B, 3, S, S] in [0, 1], in the MAE's resolution.

    Only hidden patches are painted. A decoder that was trained to predict patches normalised each by itself says
    nothing about their mean and deviation: there the original's are used, for both.

    Args:
        model: any X-Former with a MAE decoder (`model.xformer.mae_decoder`).
        pixel_values: as in the model's forward.
        mask_ratio: share of the patches to hide, in (0, 1).
        seed: of the patches; the same ones in every image.
    """
    base, config = model.xformer, model.config
    size, patches = config.mae_config.patch_size, base.mae_encoder.embeddings.patch_embeddings.num_patches
    noise = torch.rand(1, patches, generator=torch.Generator().manual_seed(seed)).expand(len(pixel_values), -1)
    image = base.encode_image(pixel_values, mask_ratio, noise.to(pixel_values.device))
    output = base.read(image)
    hidden = output.mae_mask[..., None].float()  # [B, L, 1]
    original = patchify(image.pixels.float(), size)  # [B, L, P]
    painted = {
        "MAE": base.reconstruct(replace(output, enriched_mae_tokens=output.mae_tokens)).float(),
        "X-Former": base.reconstruct(output).float(),
    }
    if config.mae_config.norm_pix_loss:
        mean, deviation = patch_statistics(original)
        painted = {label: prediction * deviation + mean for label, prediction in painted.items()}
    mean, std = (
        torch.tensor(values, device=original.device).view(1, 3, 1, 1) for values in (config.mae_mean, config.mae_std)
    )

    def blend(prediction: torch.Tensor) -> torch.Tensor:
        return (unpatchify(prediction * hidden + original * (1 - hidden), size) * std + mean).clamp(0, 1)

    hidden_pixels = unpatchify(hidden.expand_as(original), size)
    whole = blend(original)
    masked = whole * (1 - hidden_pixels) + MASKED_GREY * hidden_pixels
    return {
        "original": whole,
        "masked": masked,
        **{label: blend(prediction) for label, prediction in painted.items()},
        "hidden": hidden_pixels,
    }


def rows_of_panels(images: dict[str, torch.Tensor]) -> list[dict[str, Image.Image]]:
    """Batches float[B, 3, S, S] in [0, 1] by label -> for each image its panels by label."""
    return [
        {label: _to_image(batch[place]) for label, batch in images.items()} for place in range(len(images["original"]))
    ]


def sheet(rows: list[dict[str, Image.Image]]) -> Image.Image:
    """A row for each image, a labelled column for each stage; pixels enlarged without smoothing."""
    size = rows[0]["original"].width
    size *= max(1, round(PANEL_PIXELS / size))
    gap, header, font = 8, 28, ImageFont.load_default(size=16)
    whole = Image.new("RGB", (gap + len(rows[0]) * (size + gap), header + len(rows) * (size + gap)), "white")
    draw = ImageDraw.Draw(whole)
    for column, label in enumerate(rows[0]):
        draw.text((gap + column * (size + gap), gap // 2), label, fill="black", font=font)
    for row, images in enumerate(rows):
        for column, image in enumerate(images.values()):
            enlarged = image.resize((size, size), Image.Resampling.NEAREST)
            whole.paste(enlarged, (gap + column * (size + gap), header + row * (size + gap)))
    return whole


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """float[3, S, S] in [0, 1] -> RGB."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy())


__all__ = ["reconstructions", "rows_of_panels", "sheet"]
