"""Reconstructions of masked images."""

import pytest
import torch
from conftest import randomise, tiny_config

from xformer_mllm import XFormerForPreTraining
from xformer_mllm.report.reconstructions import panel_grid, reconstructions, to_panels


@pytest.fixture
def model():
    return XFormerForPreTraining(tiny_config()).eval()


def test_only_hidden_patches_are_reconstructed(model, images):
    with torch.no_grad():
        found = reconstructions(randomise(model), images, 0.5, seed=0)
    assert list(found) == ["original", "masked", "MAE", "X-Former", "hidden"]
    hidden = found.pop("hidden").bool()
    assert hidden.float().mean() == 0.5
    torch.testing.assert_close(found["original"], images / 255, atol=1e-6, rtol=0)
    for label, images in found.items():
        assert torch.equal(images[~hidden], found["original"][~hidden])
        assert label == "original" or not torch.equal(images[hidden], found["original"][hidden])
    assert (found["masked"][hidden] == 0.5).all()


def test_a_new_fusion_reconstructs_as_the_mae_does(model, images):
    with torch.no_grad():
        found = reconstructions(model, images, 0.5, seed=0)
    torch.testing.assert_close(found["X-Former"], found["MAE"])


def test_the_grid_has_a_row_for_each_image(model, images):
    with torch.no_grad():
        found = reconstructions(model, images[:3], 0.5, seed=0)
    del found["hidden"]
    image = panel_grid(to_panels(found))
    assert image.size == (8 + 4 * (192 + 8), 28 + 3 * (192 + 8))
    corner = image.crop((8, 28, 8 + 192, 28 + 192)).resize((32, 32), 0)
    assert corner.tobytes() == bytes(images[0].permute(1, 2, 0).flatten().tolist())
