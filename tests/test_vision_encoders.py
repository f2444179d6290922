"""Any vision tower as the second encoder: its own hidden states, its own pixels, trained, saved, used."""

import json

import pytest
import torch
from conftest import llm_inputs, randomise, tiny_config
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from xformer_mllm import XFormerConfig, XFormerForConditionalGeneration, XFormerForPreTraining, XFormerModel
from xformer_mllm.model.configuration_xformer import HALF, IMAGENET_MEAN, OPENAI_CLIP_MEAN
from xformer_mllm.model.vision_encoders import scaled
from xformer_mllm.variants import dinov2, variant_config, with_second_encoder

SIZES = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
DINO = {
    **SIZES,
    "image_size": 56,
    "patch_size": 8,
}  # made for larger images than the CLIP's, as the published ones are

# A configuration, transformers' model of it, its pixels' mean, and how many tokens M has of an image of 32 x 32.
SECOND = {
    "dinov2": (Dinov2Config(**DINO, mlp_ratio=2), Dinov2Model, IMAGENET_MEAN, 17),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig(**DINO, mlp_ratio=2, num_register_tokens=3),
        Dinov2WithRegistersModel,
        IMAGENET_MEAN,
        17,
    ),
    "dinov3": (
        DINOv3ViTConfig(**DINO, intermediate_size=48, num_register_tokens=4),
        DINOv3ViTModel,
        IMAGENET_MEAN,
        17,
    ),
    "siglip": (
        SiglipVisionConfig(**SIZES, intermediate_size=48, image_size=32, patch_size=8),
        SiglipVisionModel,
        HALF,
        16,
    ),
    "siglip2_naflex": (
        Siglip2VisionConfig(**SIZES, intermediate_size=48, num_patches=36, patch_size=8),
        Siglip2VisionModel,
        HALF,
        16,
    ),
    "clip": (
        CLIPVisionConfig(**SIZES, intermediate_size=48, image_size=32, patch_size=8),
        CLIPVisionModel,
        OPENAI_CLIP_MEAN,
        17,
    ),
}
second_encoders = pytest.mark.parametrize("name", SECOND)


def config_with(name: str, **changes) -> XFormerConfig:
    return with_second_encoder(tiny_config(**changes), SECOND[name][0])


def trained(model, inputs, steps: int = 2):
    model.freeze()
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        model(**inputs).loss.backward()
        optimiser.step()
    return model.eval()


def naflex_inputs(pixels: torch.Tensor) -> dict:
    """As transformers' own image processor cuts images that fill their patches."""
    patches = [torch.tensor(convert_image_to_patches(image.numpy(), 8)) for image in pixels]
    return {
        "pixel_values": torch.stack(patches),
        "pixel_attention_mask": torch.ones(len(pixels), 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * len(pixels)),
    }


@second_encoders
def test_m_is_the_towers_last_hidden_state_without_registers(images, name):
    tower, kind, mean, length = SECOND[name]
    config = config_with(name)
    model = randomise(XFormerModel(config)).eval()
    alone = kind(tower).eval()
    alone.load_state_dict(model.mae_encoder.state_dict())
    assert config.mae_mean == mean
    pixels = scaled(images, 32, config.mae_mean, config.mae_std, torch.float32)
    with torch.no_grad():
        theirs = alone(**naflex_inputs(pixels)) if name == "siglip2_naflex" else alone(pixels)
        states = theirs.last_hidden_state
        if name == "dinov2_with_registers":
            states = torch.cat([states[:, :1], states[:, 4:]], dim=1)
        if name == "dinov3":
            states = torch.cat([states[:, :1], states[:, 5:]], dim=1)
        output = model(images)
    assert output.mae_tokens.shape == (4, length, 40)
    torch.testing.assert_close(output.mae_tokens, states, atol=1e-5, rtol=1e-5)
    assert not output.mae_mask.any()


@second_encoders
def test_at_step_0_it_is_the_qformer_and_its_tower(images, name):
    config = config_with(name)
    model, plain = XFormerModel(config).eval(), XFormerModel(variant_config("qformer", config)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        output = model(images)
        assert torch.equal(output.fused_queries, plain(images).fused_queries)
    assert torch.equal(output.enriched_mae_tokens, output.mae_tokens)


@second_encoders
def test_both_stages_train_save_load_and_generate(images, texts, name, tmp_path):
    first = XFormerForPreTraining(config_with(name))
    frozen = {n: t.clone() for n, t in first.xformer.mae_encoder.state_dict().items()}
    before = first.xformer.fusion.blocks[0].queries_read_mae.value.weight.detach().clone()
    read = {"qformer_input_ids": texts[0], "qformer_attention_mask": texts[1]}
    trained(first, {"pixel_values": images, **read})
    assert not torch.equal(first.xformer.fusion.blocks[0].queries_read_mae.value.weight, before)
    assert all(torch.equal(t, first.xformer.mae_encoder.state_dict()[n]) for n, t in frozen.items())
    assert first(images, *texts).reconstruction_loss is None
    first.save_pretrained(tmp_path / "stage1")
    again = XFormerForPreTraining.from_pretrained(tmp_path / "stage1")
    with torch.no_grad():
        fused = first.xformer(images)
        assert torch.equal(again.xformer(images).fused_queries, fused.fused_queries)
        assert not torch.equal(fused.fused_queries, fused.queries)

    second = XFormerForConditionalGeneration(config_with(name))
    ids, mask = llm_inputs(second.config, 4)
    labels = ids.masked_fill(ids == second.config.image_token_index, -100)
    trained(second, {"pixel_values": images, "input_ids": ids, "attention_mask": mask, "labels": labels})
    second.save_pretrained(tmp_path / "stage2")
    again = XFormerForConditionalGeneration.from_pretrained(tmp_path / "stage2")
    generated = second.generate(images, ids, mask, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(again.generate(images, ids, mask, max_new_tokens=4, min_new_tokens=4), generated)
    with torch.no_grad():
        assert torch.equal(again(images, ids, mask).logits, second(images, ids, mask).logits)


@second_encoders
@pytest.mark.parametrize("variant", ["concat", "early_cross_attention", "no_reconstruction", "dinov2"])
def test_every_fusion_reads_any_tower(images, name, variant):
    model = randomise(XFormerModel(variant_config(variant, config_with(name)))).eval()
    with torch.no_grad():
        image = model.encode_image(images)
        before = model.read(image).fused_queries
        image.mae.tokens = image.mae.tokens.flip(0)
        assert not torch.equal(model.read(image).fused_queries, before)


@second_encoders
def test_without_a_decoder_nothing_is_masked(images, name):
    with pytest.raises(ValueError, match=r"reconstruction needs the decoder of a MAE, and a .* has none"):
        tiny_config(mae_config=SECOND[name][0])
    model = XFormerModel(config_with(name))
    assert model.mae_decoder is None
    with pytest.raises(ValueError, match=r"mask_ratio is 0.5, but a .* cannot be masked"):
        model(images, mask_ratio=0.5)


def test_a_frozen_tower_does_not_augment_in_training(images):
    """DINOv3 moves its positions at random in training mode."""
    model = XFormerForPreTraining(config_with("dinov3"))
    model.freeze()
    model.train()
    assert torch.equal(model.xformer.encode_image(images).mae.tokens, model.xformer.encode_image(images).mae.tokens)


def test_a_bf16_tower_feeds_an_fp32_fusion(images):
    for name in SECOND:
        model = XFormerModel(config_with(name)).eval()
        model.mae_encoder.to(torch.bfloat16)
        with torch.no_grad():
            output = model(images)
        assert output.mae_tokens.dtype == torch.float32
        assert torch.isfinite(output.fused_queries).all()


def test_towers_of_any_size_see_images_of_the_clips_size(images):
    assert config_with("dinov2").mae_image_size == 32
    assert config_with("siglip2_naflex").mae_image_size == 32
    large = SiglipVisionConfig(**SIZES, intermediate_size=48, image_size=48, patch_size=8)
    config = with_second_encoder(tiny_config(), large)
    assert config.mae_image_size == 48
    assert XFormerModel(config)(images).mae_tokens.shape[1] == 36
    fields = {"reconstruction": False, "mae_config": SECOND["dinov2"][0]}
    assert tiny_config(**fields, mae_image_size=40).mae_image_size == 40
    assert XFormerModel(tiny_config(**fields, mae_image_size=56))(images).mae_tokens.shape[1] == 1 + 49
    patches_of_14 = {"reconstruction": False, "mae_config": Dinov2Config(**SIZES)}
    assert tiny_config(**patches_of_14).mae_image_size == 28
    with pytest.raises(ValueError, match="image_size 33 is not a multiple of patch_size 8"):
        tiny_config(**fields, mae_image_size=33)
    with pytest.raises(ValueError, match="mae_image_size is 32, but this siglip_vision_model only takes 48"):
        tiny_config(mae_config=large, reconstruction=False, mae_image_size=32)


def test_a_whole_siglip_stands_for_its_vision_tower():
    whole = SiglipConfig(vision_config=SECOND["siglip"][0].to_dict())
    config = tiny_config(mae_config=whole, reconstruction=False)
    assert config.mae_config.model_type == "siglip_vision_model"
    assert config.mae_mean == HALF
    assert (
        tiny_config(
            mae_config=None,
            fusion="none",
            reconstruction=False,
            clip_config=whole.to_dict() | {"vision_config": tiny_config("siglip").clip_config.to_dict()},
        ).clip_mean
        == HALF
    )


def test_naflex_cannot_be_the_clip_tower():
    with pytest.raises(ValueError, match="use it as the second encoder only"):
        tiny_config(clip_config=Siglip2VisionConfig(**SIZES | {"hidden_size": 32}))


def test_statistics_can_be_set():
    fields = {"reconstruction": False, "mae_config": SECOND["dinov3"][0]}
    config = tiny_config(
        **fields, mae_mean=[0.43, 0.411, 0.296], mae_std=[0.213, 0.156, 0.143]
    )  # DINOv3 of satellites
    assert config.mae_mean == [0.43, 0.411, 0.296]


def test_a_configuration_of_before_other_towers_loads(tmp_path):
    config = tiny_config("siglip", clip_mean=OPENAI_CLIP_MEAN, clip_std=[0.2, 0.2, 0.2])
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["mae_image_size"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    again = XFormerConfig.from_pretrained(tmp_path)
    assert (again.clip_mean, again.clip_std) == (OPENAI_CLIP_MEAN, [0.2, 0.2, 0.2])
    assert again.mae_image_size == 32
    assert again.has_mae


def test_the_dinov2_variant_replaces_only_a_mae():
    base = tiny_config()
    variant = dinov2(base)
    assert variant.mae_config.model_type == "dinov2"
    assert (variant.mae_config.hidden_size, variant.mae_config.num_hidden_layers) == (40, 2)
    assert (variant.fusion, variant.reconstruction, variant.mae_image_size) == ("dual_cross_attention", False, 32)
    assert dinov2(config_with("dinov3")).mae_config.model_type == "dinov3_vit"
    paper = dinov2(XFormerConfig.paper())
    assert (paper.mae_config.hidden_size, paper.mae_image_size) == (1280, 224)


def test_another_mae_keeps_the_reconstruction():
    config = with_second_encoder(tiny_config(), tiny_config().mae_config)
    assert config.reconstruction
    assert not with_second_encoder(config, SECOND["dinov2"][0]).reconstruction
