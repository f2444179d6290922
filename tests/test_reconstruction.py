"""Patches there and back, and the loss against transformers' own MAE for the same noise."""

import pytest
import torch
from conftest import randomise, tiny_config
from transformers import ViTMAEForPreTraining

from xformer_mllm import XFormerModel
from xformer_mllm.model.reconstruction import patchify, unpatchify
from xformer_mllm.model.vision_encoders import encode_mae, scaled, without_masking


def test_patchify_is_transformers_own_and_has_an_inverse():
    pixels = torch.randn(2, 3, 32, 32)
    mae = ViTMAEForPreTraining(tiny_config().mae_config)
    assert torch.equal(patchify(pixels, 8), mae.patchify(pixels))
    assert torch.equal(unpatchify(patchify(pixels, 8), 8), pixels)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_loss_equals_transformers_mae_for_the_same_noise(images, normalised, ratio):
    config = tiny_config(mask_ratio=ratio)
    config.mae_config.norm_pix_loss = normalised
    config.mae_config.mask_ratio = ratio
    mae = randomise(ViTMAEForPreTraining(config.mae_config)).eval()
    model = XFormerModel(config).eval()
    model.mae_encoder.load_state_dict(mae.vit.state_dict())
    model.mae_decoder.load_state_dict(mae.decoder.state_dict())
    noise = torch.rand(4, 16)
    with torch.no_grad():
        image = model.encode_image(images, ratio, noise)
        output = model.read(image)
        pixels = scaled(images, 32, config.mae_mean, config.mae_std, torch.float32)
        theirs = mae(pixels, noise=noise)
    torch.testing.assert_close(model.reconstruction_loss(image, output), theirs.loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.reconstruct(output), theirs.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(output.mae_mask, theirs.mask)


def test_a_ratio_of_zero_keeps_every_patch_in_its_place(images):
    config = tiny_config()
    config.mae_config.mask_ratio = 0.0
    mae = randomise(ViTMAEForPreTraining(config.mae_config)).eval()
    pixels = scaled(images, 32, config.mae_mean, config.mae_std, torch.float32)
    with torch.no_grad():
        ours = encode_mae(without_masking(mae.vit), pixels)
        theirs = mae.vit(pixels, noise=torch.arange(16.0).expand(4, -1))
    torch.testing.assert_close(ours.tokens, theirs.last_hidden_state, atol=1e-6, rtol=1e-5)
    assert not ours.mask.any()
    assert torch.equal(ours.ids_restore, torch.arange(16).expand(4, -1))


def test_masking_keeps_the_asked_share_and_says_which(images):
    model = XFormerModel(tiny_config()).eval()
    image = model.encode_image(images, 0.5)
    assert image.mae.tokens.shape[1] == 1 + 8
    assert (image.mae.mask.sum(1) == 8).all()
