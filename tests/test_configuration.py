"""Configurations survive their JSON, and impossible ones say why in one line."""

import json
import re

import pytest
from conftest import TOWERS, tiny_config
from transformers import AutoConfig, LlamaConfig, ResNetConfig, SwinConfig, ViTMAEConfig

from xformer_mllm import VARIANTS, XFormerConfig
from xformer_mllm.embedded import start
from xformer_mllm.train.config import Stage1Config
from xformer_mllm.variants import variant_config, with_settings


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tower", TOWERS)
def test_every_variant_survives_saving(tmp_path, variant, tower):
    config = variant_config(variant, tiny_config(tower))
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, XFormerConfig)
    a, b = config.to_dict(), again.to_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        a.pop(volatile, None), b.pop(volatile, None)
    assert a == b


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "dual"}, "fusion 'dual' is unknown; choose one of none, concat"),
        ({"mae_config": None}, "needs a second encoder"),
        ({"fusion": "concat"}, "no other fusion changes the tokens M"),
        ({"clip_feature_layer": 3}, "the CLIP tower has 3 layers"),
        ({"clip_shallow_layer": 1}, "both name the source of M"),
        ({"mask_ratio": 1.0}, "below 1"),
        ({"mask_ratio": 0.0}, "mask_ratio above 0"),
        ({"reconstruction": False, "reconstruction_in_stage2": True}, "needs reconstruction"),
        ({"num_query_tokens": 0}, "num_query_tokens is 0; it must be 1 or more"),
        ({"fusion_blocks": 0}, "fusion_blocks is 0; it must be 1 or more"),
        ({"mae_config": LlamaConfig()}, "mae_config: a llama has no single patch_size; the second encoder must be"),
        ({"mae_config": ResNetConfig()}, "mae_config: a resnet has no single hidden_size"),
        ({"mae_config": SwinConfig()}, "mae_config: a swin has no single num_attention_heads"),
        ({"mae_config": ViTMAEConfig(image_size=30, patch_size=8)}, "30 is not a multiple of patch_size 8"),
    ],
)
def test_what_cannot_go_together_is_said_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value)


def test_encoder_widths_that_disagree_are_said():
    config = tiny_config()
    config.qformer_config.encoder_hidden_size = 33
    with pytest.raises(ValueError, match="encoder_hidden_size is 33, but the CLIP tower is 32 wide"):
        XFormerConfig(
            clip_config=config.clip_config, mae_config=config.mae_config, qformer_config=config.qformer_config
        )


def test_what_is_no_x_formers_is_not_read_as_the_papers(tmp_path):
    run, model = tmp_path / "run", tmp_path / "run" / "model"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(
        ValueError, match=r"run/config.json is not an X-Former's configuration \(model_type: unknown\)$"
    ):
        XFormerConfig.from_pretrained(run)
    tiny_config(num_query_tokens=3).save_pretrained(model)
    for source in (run, run / "config.json"):
        with pytest.raises(
            ValueError, match=r"run/config.json is a run's configuration; the model's is in .*run/model$"
        ):
            XFormerConfig.from_pretrained(source)
    for source in (model, model / "config.json"):
        assert XFormerConfig.from_pretrained(source).num_query_tokens == 3
    ViTMAEConfig().save_pretrained(tmp_path / "mae")
    with pytest.raises(
        ValueError, match=r"mae/config.json is not an X-Former's configuration \(model_type: vit_mae\)$"
    ):
        XFormerConfig.from_pretrained(tmp_path / "mae")
    whole = ViTMAEConfig()
    whole.xformer_config = tiny_config(num_query_tokens=5).to_dict()
    whole.save_pretrained(tmp_path / "whole")  # as attach_xformer leaves it in a BLIP-2's
    assert XFormerConfig.from_pretrained(tmp_path / "whole").num_query_tokens == 5


def test_a_variant_leaves_its_base_alone():
    base = tiny_config()
    before = base.to_dict()
    for variant in VARIANTS.values():
        variant(base)
    assert base.to_dict() == before


def test_settings_are_fields_by_name():
    base = start.embedded_config()
    changed = with_settings(
        base, ["num_query_tokens=32", "qformer_config.hidden_size=144", "reconstruction_weight=0.5"]
    )
    assert (changed.num_query_tokens, changed.qformer_config.hidden_size, changed.reconstruction_weight) == (
        32,
        144,
        0.5,
    )
    assert base.num_query_tokens == 12
    assert variant_config("qformer", changed).num_query_tokens == 32
    untouched = with_settings(base, [])
    assert untouched.to_dict() == base.to_dict()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("num_query_token=3", "num_query_token=3: expected NAME=VALUE"),
        ("qformer_config.hidden=3", "expected NAME=VALUE with a field"),
        ("qformer_config=3", "expected NAME=VALUE"),
        ("num_query_tokens", "expected NAME=VALUE"),
        ("a.b.c=3", "expected NAME=VALUE"),
        ("fusion_blocks=two", "a value of another kind"),
        ("fusion_blocks=0", "must be 1 or more"),
    ],
)
def test_a_wrong_setting_is_one_line(setting, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        with_settings(start.embedded_config(), [setting])


def test_settings_reach_the_model_and_only_a_new_one(tmp_path):
    model, _ = start.start_pretraining("xformer", settings=["fusion_blocks=2"])
    assert len(model.xformer.fusion.blocks) == 2
    with pytest.raises(ValueError, match="cannot be combined with --start-from"):
        Stage1Config(start_from=tmp_path, model_settings=("fusion_blocks=2",))
