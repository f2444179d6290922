"""A checkpoint that cannot be what it is named as is said in one line."""

import pytest
import torch
from published import fails
from transformers import T5Config

pytest_plugins = ["published_files"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--qformer", "blip2"), "name it with --mae"),
        (("--qformer", "blip2", "--mae", "mae", "--variant", "qformer"), "leave --mae out"),
        (("--qformer", "nowhere/at/all", "--variant", "nothing"), "variant 'nothing' is unknown"),
        (("--qformer", "blip2", "--mae", "mae", "--variant", "random_mae"), "nothing to convert"),
        (("--qformer", "mae", "--mae", "mae"), "--qformer takes a BLIP-2 or a BERT"),
        (("--qformer", "eva_vit_g.pth", "--mae", "mae"), "a .pth without Q-Former"),
        (("--qformer", "blip2_pretrained.pth", "--mae", "mae"), "has no CLIP tower; name it with --clip"),
        (
            ("--qformer", "blip2_pretrained.pth", "--clip", "blip2_pretrained.pth", "--mae", "mae"),
            "not LAVIS's EVA-CLIP",
        ),
        (("--qformer", "blip2", "--mae", "blip2_pretrained.pth"), "--mae takes a hub id or a folder"),
        (("--qformer", "blip2", "--mae", "bert"), "bert is no vision tower"),
        (("--qformer", "blip2", "--mae", "dino"), "needs the decoder of a MAE"),
        (("--qformer", "itm", "--mae", "mae", "--qformer-tokenizer", "opt"), "not a BERT's tokenizer"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(files, words, message, tmp_path, capsys):
    assert message in fails(files, capsys, tmp_path / "out", *words)


def test_an_encoder_decoder_is_refused(files, tmp_path, capsys):
    T5Config().save_pretrained(tmp_path / "t5")
    words = ("--qformer", "blip2", "--mae", "mae", "--llm", tmp_path / "t5")
    assert "a t5 is no causal language model" in fails(files, capsys, tmp_path / "out", *words)


@pytest.mark.parametrize("missing", ["pos_embed", "blocks.1.attn.v_bias"])
def test_a_tower_that_is_not_whole_is_said(files, missing, tmp_path, capsys):
    tensors = torch.load(files / "eva_vit_g.pth")
    del tensors[missing]
    torch.save(tensors, tmp_path / "cut.pth")
    words = ("--qformer", "blip2_pretrained.pth", "--clip", tmp_path / "cut.pth", "--mae", "mae")
    error = fails(files, capsys, tmp_path / "out", *words)
    assert "not a whole EVA-CLIP" in error or "no source has 'xformer.clip_encoder.tower.encoder.layers.1" in error
