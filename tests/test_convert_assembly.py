"""The origin of each tensor, and the written files."""

from types import SimpleNamespace

import pytest
import torch
from published import (
    BLIP2,
    LAVIS,
    PUBLISHED,
    TINY,
    bert_tokenizer,
    differences,
    eva,
    fails,
    lavis_stage1,
    lavis_stage2,
    old_bert_name,
    old_mae_name,
    opt_config,
    opt_tokenizer,
    random_tensors,
    run,
)
from safetensors import SafetensorError
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertForPreTraining,
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from xformer_mllm import XFormerConfig, XFormerForConditionalGeneration
from xformer_mllm.commands import ConvertConfig
from xformer_mllm.convert.assembly import build_target, make_plan, part_of
from xformer_mllm.convert.sources import Source, Sources
from xformer_mllm.model.modeling_xformer import FROZEN

pytest_plugins = ["published_files"]


def changed(files, tmp_path, name, change):
    """A copy of a .pth file in which `change` has been at the tensors."""
    content = torch.load(files / name)
    change(content["model"])
    torch.save(content, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def test_a_missing_tensor_is_an_error_unless_allowed(files, tmp_path, capsys):
    source = changed(files, tmp_path, "blip2_pretrained.pth", lambda t: t.pop("itm_head.bias"))
    assert "no source has 'itm_head.bias'" in fails(files, capsys, tmp_path / "out", "--qformer", source, *LAVIS)
    assert run(files, tmp_path / "out", "--qformer", source, *LAVIS, "--allow", "itm_head.*") == 0
    assert "ITM logits" not in differences(tmp_path / "out")


def test_a_tower_that_is_initialised_is_not_compared(files, tmp_path):
    tensors = torch.load(files / "blip2_pretrained.pth")["model"] | random_tensors(eva(TINY, 3, "visual_encoder."))
    del tensors["visual_encoder.patch_embed.proj.bias"]
    torch.save({"model": tensors}, tmp_path / "cut.pth")
    words = ("--qformer", tmp_path / "cut.pth", "--mae", "mae", "--allow", "*.patch_embedding.bias")
    assert run(files, tmp_path / "out", *words) == 0
    assert set(differences(tmp_path / "out")) == {"reconstruction loss"}


def test_a_misshapen_tensor_is_an_error_unless_allowed(files, tmp_path, capsys):
    def cut(tensors):
        tensors["text_proj.weight"] = tensors["text_proj.weight"][:, :-1]

    source = changed(files, tmp_path, "blip2_pretrained.pth", cut)
    error = fails(files, capsys, tmp_path / "out", "--qformer", source, *LAVIS)
    assert f"'text_projection.weight' is (16, 127) in {source}, the model needs (16, 128)" in error
    assert run(files, tmp_path / "out", "--qformer", source, *LAVIS, "--allow", "text_projection.*") == 0


def test_a_tensor_without_a_place_is_an_error_unless_allowed(files, tmp_path, capsys):
    source = changed(files, tmp_path, "blip2_pretrained.pth", lambda t: t.update(extra=torch.ones(2)))
    assert "has 'extra', which has no place" in fails(files, capsys, tmp_path / "out", "--qformer", source, *LAVIS)
    layer = "Qformer.bert.encoder.layer.4.attention.output.dense.bias"
    source = changed(files, tmp_path, "blip2_pretrained_opt2.7b.pth", lambda t: t.update({"extra": torch.ones(2)}))
    words = ("--qformer", source, *LAVIS, "--llm", "opt", "--allow", "extra")
    assert run(files, tmp_path / "out", *words) == 0
    source = changed(files, tmp_path, "blip2_pretrained.pth", lambda t: t.update({layer: torch.ones(128)}))
    assert "layer.4." in fails(files, capsys, tmp_path / "more", "--qformer", source, *LAVIS)


def test_a_blip2_of_stage_2_does_not_start_stage_1_by_itself(files, tmp_path, capsys):
    error = fails(files, capsys, tmp_path / "out", "--qformer", "blip2", "--mae", "mae")
    assert "LAVIS's blip2_pretrained.pth has it" in error
    names = ("xformer.embeddings.*", "xformer.qformer.*", "*_projection.*", "itm_head.*", "itg_*", "temperature")
    assert run(files, tmp_path / "out", "--qformer", "blip2", "--mae", "mae", "--allow", *names) == 0
    assert "queries" in differences(tmp_path / "out")


def test_another_language_model_needs_another_projection(files, tmp_path, capsys):
    OPTForCausalLM(opt_config(num_hidden_layers=3)).save_pretrained(tmp_path / "deeper")
    opt_tokenizer().save_pretrained(tmp_path / "deeper")
    words = ("--qformer", "blip2", "--mae", "mae", "--llm", tmp_path / "deeper")
    assert "no source has 'language_projection.weight'" in fails(files, capsys, tmp_path / "out", *words)
    assert run(files, tmp_path / "out", *words, "--allow", "language_projection.*") == 0
    assert "logits" not in differences(tmp_path / "out")


@pytest.mark.parametrize("mae", ["mae_encoder", "mae_model"])
def test_a_mae_without_decoder_cannot_reconstruct(files, mae, tmp_path, capsys):
    words = ("--qformer", "blip2", "--mae", mae, "--llm", "opt")
    assert "use --variant no_reconstruction" in fails(files, capsys, tmp_path / "out", *words)
    assert run(files, tmp_path / "out", *words, "--variant", "no_reconstruction") == 0
    assert run(files, tmp_path / "new", *words, "--allow", "xformer.mae_decoder.*") == 0
    assert "reconstruction loss" not in differences(tmp_path / "new")


# -- the published sizes ------------------------------------------------------------------------------------------------


def on_meta(kind, tensors, config=None):
    tensors = {
        name: torch.empty(t, device="meta") if isinstance(t, tuple) else t.to("meta") for name, t in tensors.items()
    }
    return Source(kind, kind, tensors, None, config)


def built_on_meta(kind, config):
    with torch.device("meta"):
        return kind(config).state_dict()


OPT_2_7B = OPTConfig(
    hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=2560
)


def published_blip2():
    """Salesforce/blip2-opt-2.7b: its vocabulary has been padded for <image>."""
    text = OPT_2_7B.to_dict() | {"vocab_size": 50304}
    config = Blip2Config(text_config=text, image_token_index=50265)
    return on_meta("blip-2", built_on_meta(Blip2ForConditionalGeneration, config), config)


def published_mae(old):
    """facebook/vit-mae-huge."""
    sizes = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
    config = ViTMAEConfig(**sizes, patch_size=14)
    tensors = built_on_meta(ViTMAEForPreTraining, config)
    return on_meta("vit_mae", {old_mae_name(n) if old else n: t for n, t in tensors.items()}, config)


def published_opt():
    return on_meta("", built_on_meta(OPTForCausalLM, OPT_2_7B), OPT_2_7B)


def published_bert():
    tensors = built_on_meta(BertForPreTraining, BertConfig())
    return on_meta("bert", {old_bert_name(n): t for n, t in tensors.items()}, BertConfig())


def plan_of(monkeypatch, qformer, tower=None, llm=None, old=True):
    """The plan of a conversion at the published sizes."""

    class Bert(PreTrainedTokenizerFast):
        def __len__(self):
            return 30523

    tokenizer = bert_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    big = Bert(tokenizer_object=tokenizer.backend_tokenizer, bos_token="[DEC]", unk_token="[UNK]", pad_token="[PAD]")
    monkeypatch.setattr("xformer_mllm.convert.assembly.qformer_tokenizer", lambda *_: big)
    monkeypatch.setattr("xformer_mllm.convert.assembly.llm_tokenizer", lambda *_: opt_tokenizer())
    settings = ConvertConfig(qformer="", output_dir="")
    target = build_target(settings, Sources(qformer, tower or qformer, published_mae(old), llm))
    return make_plan(target), target


def initialised_parts(plan):
    return {part_of(name) for name in plan.fresh}


@pytest.mark.parametrize("old", [True, False])
def test_the_published_blip2_and_mae_map_completely(monkeypatch, old):
    plan, target = plan_of(monkeypatch, published_blip2(), llm=published_opt(), old=old)
    assert initialised_parts(plan) == {"fusion"}
    assert {reason for _, reason in plan.left} == {"the language model comes from --llm"}
    paper = XFormerConfig.paper()
    for part in ("clip_config", "mae_config"):
        ours, theirs = getattr(target.config, part).to_diff_dict(), getattr(paper, part).to_diff_dict()
        assert {name: value for name, value in ours.items() if name not in ("dtype", "transformers_version")} == {
            name: value for name, value in theirs.items() if name not in ("dtype", "transformers_version")
        }
    assert sum(t.numel() for n, t in target.wanted.items() if n.startswith("xformer.clip_encoder")) / 1e6 == (
        pytest.approx(986, rel=0.001)
    )


def test_the_published_lavis_stage_1_maps_completely(monkeypatch):
    qformer, tower = on_meta("LAVIS", lavis_stage1(PUBLISHED)), on_meta("EVA-CLIP", eva(PUBLISHED))
    plan, target = plan_of(monkeypatch, qformer, tower)
    assert initialised_parts(plan) == {"fusion"}
    assert {reason for _, reason in plan.left} == {
        "tied to the word embeddings and the bias", "numbers of positions, not weights", "after the layer that is read"
    }  # fmt: skip
    assert target.config.clip_config.num_hidden_layers == 39
    assert target.config.clip_config.num_attention_heads == 16
    paper = XFormerConfig.paper().qformer_config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                 "cross_attention_frequency", "encoder_hidden_size", "max_position_embeddings"):  # fmt: skip
        assert getattr(target.config.qformer_config, name) == getattr(paper, name), name


def test_the_published_lavis_stage_2_maps_completely(monkeypatch):
    qformer, tower = on_meta("LAVIS", lavis_stage2(PUBLISHED)), on_meta("EVA-CLIP", eva(PUBLISHED))
    plan, _ = plan_of(monkeypatch, qformer, tower, published_opt())
    assert initialised_parts(plan) == {"fusion"}
    assert {reason for _, reason in plan.left} == {
        "numbers of positions, not weights",
        "after the layer that is read",
    }


def test_the_published_bert_maps_completely(monkeypatch):
    plan, target = plan_of(monkeypatch, published_bert(), on_meta("EVA-CLIP", eva(PUBLISHED)))
    assert initialised_parts(plan) == {
        "fusion", "clip_encoder", "clip_layernorm", "query_tokens", "qformer", "vision_projection", "text_projection",
        "itm_head", "temperature",
    }  # fmt: skip
    assert all(".crossattention." in name for name in plan.fresh if name.startswith("xformer.qformer."))
    assert len(target.model.itg_bias) == 30523


def test_frozen_parts_are_bf16_and_trained_ones_fp32(files, tmp_path):
    assert run(files, tmp_path / "out", *BLIP2) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        frozen = set(FROZEN) & set(name.split(".")[:2])
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    assert max(differences(tmp_path / "out").values()) < 1e-2


def test_shards_load_as_one_file_does(files, converted, tmp_path, monkeypatch):
    monkeypatch.setattr("xformer_mllm.convert.assembly.SHARD_BYTES", 300_000)
    assert run(files, tmp_path / "out", *BLIP2, "--dtype", "float32") == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    a, b = (
        XFormerForConditionalGeneration.from_pretrained(path).state_dict() for path in (converted, tmp_path / "out")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_seed_decides_what_is_initialised(files, converted, tmp_path):
    assert run(files, tmp_path / "out", *BLIP2, "--dtype", "float32", "--seed", 1) == 0
    a, b = (
        XFormerForConditionalGeneration.from_pretrained(path).state_dict() for path in (converted, tmp_path / "out")
    )
    changed = {name.split(".")[1] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"fusion"}


def test_a_full_disk_is_reported_before_writing(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("xformer_mllm.checkpoints.shutil.disk_usage", lambda _: SimpleNamespace(free=1e6))
    assert "the weights take 0.002 GB, and 0.001 GB are free" in fails(files, capsys, tmp_path / "out", *BLIP2)


def test_a_disk_that_fills_up_is_reported(files, tmp_path, capsys, monkeypatch):
    def save_file(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("xformer_mllm.checkpoints.save_file", save_file)
    assert "No space left on device" in fails(files, capsys, tmp_path / "out", *BLIP2)


def test_weights_have_the_configurations_permissions(converted):
    assert (converted / "model.safetensors").stat().st_mode == (converted / "config.json").stat().st_mode
