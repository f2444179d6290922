"""The whole command: from published layouts, tiny, to a starting X-Former that its parents recognise."""

import pytest
import torch
from published import (
    BLIP2,
    WORDS,
    differences,
    fails,
    opt_config,
    opt_tokenizer,
    record,
    run,
    t5_config,
    t5_tokenizer,
)
from transformers import (
    AutoModelForImageTextToText,
    BertForPreTraining,
    Blip2ForConditionalGeneration,
    OPTForCausalLM,
    T5ForConditionalGeneration,
)

from xformer_mllm import XFormerForConditionalGeneration, XFormerForPreTraining, XFormerProcessor
from xformer_mllm.checkpoints import load_model, start_generation
from xformer_mllm.cli import main
from xformer_mllm.model.vision_encoders import scaled

pytest_plugins = ["published_files"]


def test_a_blip2_and_a_mae_become_the_start_of_stage_2(files, converted):
    model, report = AutoModelForImageTextToText.from_pretrained(converted, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model, XFormerForConditionalGeneration)
    assert (model.config.clip_mean, model.config.clip_std) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert model.config.mae_mean == [0.485, 0.456, 0.406]
    assert model.config.mae_config.norm_pix_loss
    assert model.generation_config.eos_token_id == 7
    assert set(differences(converted)) == {"CLIP tokens", "queries", "logits", "reconstruction loss"}
    assert max(differences(converted).values()) < 1e-5

    blip2 = Blip2ForConditionalGeneration.from_pretrained(files / "blip2").eval()
    blip2.vision_model.post_layernorm.eps = 1e-5
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    pixels = scaled(images, 28, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], torch.float32)
    processor = XFormerProcessor.from_pretrained(converted)
    text = processor(text=["what is in the image?", "a"])
    theirs = text["input_ids"].masked_fill(text["input_ids"] == processor.image_token_id, 3)
    with torch.no_grad():
        expected = blip2(pixels, theirs, text["attention_mask"]).logits
        torch.testing.assert_close(model(images, **text).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "variant",
    ["qformer", "concat", "early_cross_attention", "clip_shallow", "no_reconstruction", "reconstruction_in_stage2"],
)
def test_every_variant_starts_from_the_same_parents(files, variant, tmp_path):
    mae = () if variant in ("qformer", "clip_shallow") else ("--mae", "mae")
    words = ("--qformer", "blip2", *mae, "--llm", "opt", "--variant", variant)
    assert run(files, tmp_path / "out", *words) == 0
    assert ("logits" in differences(tmp_path / "out")) == (variant != "concat")
    if mae:
        reconstructs = variant == "reconstruction_in_stage2"
        assert ("reconstruction loss" if reconstructs else "second encoder's tokens") in differences(tmp_path / "out")


def test_the_second_encoder_may_be_another_tower(files, tmp_path):
    words = ("--qformer", "blip2", "--mae", "dino", "--llm", "opt")
    assert run(files, tmp_path / "out", *words, "--variant", "dinov2", "--dtype", "float32") == 0
    assert differences(tmp_path / "out")["second encoder's tokens"] < 1e-5
    assert XFormerForConditionalGeneration.from_pretrained(tmp_path / "out").config.mae_image_size == 28


@pytest.mark.parametrize("tower", ["clip", "eva_vit_g.pth", "blip2"])
def test_a_bert_starts_stage_1_behind_any_tower(files, tower, tmp_path):
    words = ("--qformer", "bert", "--qformer-tokenizer", "bert", "--clip", tower, "--mae", "mae", "--dtype", "float32")
    assert run(files, tmp_path / "out", *words) == 0
    assert set(differences(tmp_path / "out")) == {"CLIP tokens", "text states", "reconstruction loss"}
    model, processor = load_model(tmp_path / "out", [XFormerForPreTraining])
    tokenizer = processor.qformer_tokenizer
    assert model.config.text_start_token_id == tokenizer.convert_tokens_to_ids("[DEC]") == len(WORDS) + 5
    assert len(model.xformer.embeddings.word_embeddings.weight) == len(model.itg_bias) == len(WORDS) + 6
    bert = BertForPreTraining.from_pretrained(files / "bert")
    layer = model.xformer.qformer.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, bert.bert.encoder.layer[1].intermediate.dense.weight)
    assert torch.equal(layer.output.dense.weight, layer.output_query.dense.weight)
    states = torch.randn(2, 128)
    with torch.no_grad():
        logits = model.itg_logits(states[None])[0, :, :-1]
        torch.testing.assert_close(logits, bert.cls.predictions(states), atol=1e-4, rtol=1e-4)
    assert len(model.xformer.query_tokens[0].unique(dim=0)) == 32
    text = processor(qformer_text=["a red circle", "the image"])
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    assert torch.isfinite(model(images, **text).loss)


def test_a_blip2_with_t5_becomes_the_start_of_stage_2(files, tmp_path):
    words = ("--qformer", "blip2_t5", "--mae", "mae", "--llm", "t5", "--dtype", "float32")
    assert run(files, tmp_path / "out", *words) == 0
    assert set(differences(tmp_path / "out")) == {"CLIP tokens", "queries", "logits", "reconstruction loss"}
    assert max(differences(tmp_path / "out").values()) < 1e-5

    model, processor = load_model(tmp_path / "out", [XFormerForConditionalGeneration])
    assert processor.encoder_decoder
    assert model.generation_config.eos_token_id == 1
    blip2 = Blip2ForConditionalGeneration.from_pretrained(files / "blip2_t5").eval()
    blip2.vision_model.post_layernorm.eps = 1e-5
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    pixels = scaled(images, 28, model.config.clip_mean, model.config.clip_std, torch.float32)
    text = processor(text=["what is in the image?", "a"])
    ids = text["input_ids"].masked_fill(text["input_ids"] == processor.image_token_id, 3)
    answers = torch.randint(5, 250, (2, 6))
    with torch.no_grad():
        expected = blip2(pixels, ids, text["attention_mask"], decoder_input_ids=answers).logits
        torch.testing.assert_close(model(images, **text, decoder_input_ids=answers).logits, expected)
    said = blip2.generate(pixels, ids, text["attention_mask"], max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(images, **text, max_new_tokens=6, do_sample=False), said)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_t5_converts_in_every_precision(files, dtype, tmp_path):
    words = ("--qformer", "blip2_t5", "--mae", "mae", "--llm", "t5", "--dtype", dtype)
    assert run(files, tmp_path / "out", *words) == 0
    assert "logits" in differences(tmp_path / "out")


def test_a_t5_with_tied_words_starts_stage_2(files, tmp_path):
    T5ForConditionalGeneration(t5_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "t5")
    t5_tokenizer().save_pretrained(tmp_path / "t5")
    out, llm = tmp_path / "out", str(tmp_path / "t5")
    assert run(files, out, "--qformer", "bert", "--clip", "blip2", "--mae", "mae", "--llm", llm) == 0
    model, _ = load_model(out, [XFormerForConditionalGeneration])
    words = model.language_model.get_input_embeddings().weight
    assert words.data_ptr() == model.language_model.get_output_embeddings().weight.data_ptr()
    assert torch.equal(words, T5ForConditionalGeneration.from_pretrained(llm, dtype=torch.bfloat16).shared.weight)
    few = ["--steps", "2", "--batch-size", "3", "--train-size", "6", "--sample-steps", "9", "--num-workers", "0"]
    stage2 = ["train", "stage2", "--from-pretraining", str(out), "--output-dir", str(tmp_path / "stage2"), *few]
    assert main(stage2) == 0


def test_a_bert_and_a_language_model_start_stage_2(files, tmp_path):
    """The test question is longer than the tiny OPT's 64 positions leave beside 32 queries."""
    words = ("--qformer", "bert", "--clip", "blip2", "--mae", "mae", "--llm", "opt")
    assert run(files, tmp_path / "out", *words) == 0
    assert set(differences(tmp_path / "out")) == {"CLIP tokens", "reconstruction loss"}
    model, processor = load_model(tmp_path / "out", [XFormerForConditionalGeneration])
    assert torch.isfinite(model(torch.zeros(1, 3, 28, 28), **processor(text="what is it ?")).logits).all()


def test_a_language_model_of_few_positions_is_an_error(files, tmp_path, capsys):
    OPTForCausalLM(opt_config(max_position_embeddings=32)).save_pretrained(tmp_path / "short")
    opt_tokenizer().save_pretrained(tmp_path / "short")
    words = ("--qformer", "bert", "--clip", "blip2", "--mae", "mae")
    message = "short: reads at most 32 tokens, and the soft prompt alone takes 32"
    assert message in fails(files, capsys, tmp_path / "out", *words, "--llm", tmp_path / "short")
    assert run(files, tmp_path / "stage1", *words) == 0
    with pytest.raises(ValueError, match=message):
        start_generation(tmp_path / "stage1", str(tmp_path / "short"))


def test_converted_stage_1_continues_to_stage_2(files, tmp_path):
    assert run(files, tmp_path / "out", "--qformer", "itm", "--mae", "mae", "--allow", "itg_*", "temperature") == 0
    assert {"ITC scores", "ITM logits"} < set(differences(tmp_path / "out"))
    model, _ = start_generation(tmp_path / "out", str(files / "opt"))
    assert model.xformer.fusion is not None


def test_stage_1s_blip2_starts_stage_2_with_a_new_projection(files, tmp_path):
    assert run(files, tmp_path / "out", "--qformer", "itm", "--mae", "mae", "--llm", "opt") == 0
    parts = {(row["part"], row["from"]) for row in record(tmp_path / "out")["parts"]}
    assert ("language_projection", "initialised") in parts
    assert "queries" in differences(tmp_path / "out")
    assert {row["why"] for row in record(tmp_path / "out")["left"]} == {"stage 1 only"}


def test_another_tower_behind_a_qformer_is_run_with_it(files, tmp_path):
    words = ("--qformer", "itm", "--clip", "blip2", "--mae", "mae", "--allow", "itg_*", "temperature")
    assert run(files, tmp_path / "out", *words, "--dtype", "float32") == 0
    assert max(differences(tmp_path / "out").values()) < 1e-5
    assert "ITM logits" in differences(tmp_path / "out")


def test_nothing_is_overwritten(files, tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    assert run(files, tmp_path, *BLIP2) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_converted_model_is_trained_through_both_stages(files, tmp_path, capsys):
    start, stage1 = tmp_path / "start", tmp_path / "stage1"
    assert run(files, start, "--qformer", "bert", "--clip", "blip2", "--mae", "mae") == 0
    few = ["--steps", "2", "--batch-size", "3", "--train-size", "6", "--sample-steps", "9", "--num-workers", "0"]
    words = ["train", "stage1", "--start-from", str(start), "--output-dir", str(stage1), *few]
    assert main([*words, "--variant", "qformer"]) == 2
    assert "is not of the variant qformer" in capsys.readouterr().err
    assert main(words) == 0
    began, trained = (XFormerForPreTraining.from_pretrained(folder) for folder in (start, stage1 / "model"))
    weights = dict(began.named_parameters())
    for name, weight in trained.named_parameters():
        frozen = name.startswith(("xformer.clip_encoder", "xformer.mae_"))
        assert weight.dtype == (torch.bfloat16 if frozen else torch.float32), name
        assert not frozen or torch.equal(weight, weights[name]), name
    assert not torch.equal(trained.xformer.query_tokens, began.xformer.query_tokens)
    stage2 = ["train", "stage2", "--from-pretraining", str(stage1), "--llm", "opt", "--text", "captions"]
    assert main([*stage2, "--output-dir", str(tmp_path / "stage2"), *few]) == 0


def test_stage_2_starts_from_a_converted_model(converted, files):
    parent = XFormerForConditionalGeneration.from_pretrained(converted)
    model, _ = start_generation(converted)
    torch.testing.assert_close(model.language_projection.weight, parent.language_projection.weight, atol=0, rtol=0)
    assert all(p.dtype == torch.float32 for n, p in model.xformer.qformer.named_parameters())
    with pytest.raises(ValueError, match="its prompt format is fixed"):
        start_generation(converted, instruction_aware=True)
