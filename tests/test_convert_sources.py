"""Checkpoints that cannot be found or read, or do not fit what they are named as."""

import pytest
import torch
from published import blip2_config, fails
from torch.nn import functional

pytest_plugins = ["published_files"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at/all", "no such file or folder"),
        ("Salesforce/blip2-opt-2.7b", "not available on the Hub"),
        ("strange", "transformers does not know ('strange')"),
        ("empty", "no config.json in it"),
        ("no_weights", "no weights in it"),
        ("broken", "damaged or cut short"),
        ("code.pth", "not a checkpoint that can be read safely"),
        ("list.pth", "no tensors in it"),
    ],
)
def test_unreadable_checkpoints_are_an_error(files, name, message, tmp_path, capsys):
    for folder in ("strange", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange"}')
    blip2_config().save_pretrained(tmp_path / "no_weights")
    blip2_config().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x10\0\0\0")
    torch.save({"model": functional.gelu}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    named = tmp_path / name if (tmp_path / name).exists() else name
    assert message in fails(files, capsys, tmp_path / "out", "--qformer", named, "--mae", "mae")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--qformer", "blip2"), "name it with --mae"),
        (("--qformer", "blip2", "--mae", "mae", "--variant", "qformer"), "leave --mae out"),
        (("--qformer", "nowhere/at/all", "--variant", "nothing"), "variant 'nothing' is unknown"),
        (("--qformer", "blip2", "--mae", "mae", "--variant", "random_mae"), "nothing to convert"),
        (("--qformer", "mae", "--mae", "mae"), "--qformer takes a BLIP-2 or a BERT"),
        (("--qformer", "eva_vit_g.pth", "--mae", "mae"), "holds EVA-CLIP; --qformer takes"),
        (("--qformer", "blip2_pretrained.pth", "--mae", "mae"), "has no CLIP tower; name it with --clip"),
        (
            ("--qformer", "blip2_pretrained.pth", "--clip", "blip2_pretrained.pth", "--mae", "mae"),
            "holds LAVIS; --clip takes LAVIS's eva_vit_g.pth",
        ),
        (("--qformer", "blip2", "--mae", "blip2_pretrained.pth"), "--mae takes a Hub id or a folder"),
        (("--qformer", "blip2", "--mae", "bert"), "bert is not a vision tower"),
        (("--qformer", "blip2", "--mae", "dino"), "needs the decoder of a MAE"),
        (("--qformer", "itm", "--mae", "mae", "--qformer-tokenizer", "opt"), "not a BERT's tokenizer"),
        (
            ("--qformer", "itm", "--mae", "mae", "--qformer-tokenizer", "bert-base-uncased"),
            "--qformer-tokenizer bert-base-uncased: no such file or folder, and not available on the Hub",
        ),
    ],
)
def test_sources_that_do_not_fit_are_an_error(files, words, message, tmp_path, capsys):
    assert message in fails(files, capsys, tmp_path / "out", *words)


def test_what_is_no_language_model_is_refused(files, tmp_path, capsys):
    words = ("--qformer", "blip2", "--mae", "mae", "--llm", "clip")
    assert "a clip is not a language model" in fails(files, capsys, tmp_path / "out", *words)


@pytest.mark.parametrize("missing", ["pos_embed", "blocks.1.attn.v_bias"])
def test_an_incomplete_tower_is_an_error(files, missing, tmp_path, capsys):
    tensors = torch.load(files / "eva_vit_g.pth")
    del tensors[missing]
    torch.save(tensors, tmp_path / "cut.pth")
    words = ("--qformer", "blip2_pretrained.pth", "--clip", tmp_path / "cut.pth", "--mae", "mae")
    error = fails(files, capsys, tmp_path / "out", *words)
    assert "not a whole EVA-CLIP" in error or "no source has 'xformer.clip_encoder.tower.encoder.layers.1" in error
