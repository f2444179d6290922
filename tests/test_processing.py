"""Pictures and texts through the processor, as each consumer needs them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from xformer_mllm import XFormerConfig
from xformer_mllm.checkpoints import WEIGHTS
from xformer_mllm.model.processing_xformer import MAX_CAPTION_TOKENS, XFormerProcessor, image_processor


@pytest.fixture
def processor():
    qformer = AutoTokenizer.from_pretrained(WEIGHTS / "qformer_tokenizer")
    return XFormerProcessor(image_processor(48), AutoTokenizer.from_pretrained(WEIGHTS / "opt"), qformer, 5)


def picture(width=48, height=48):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_of_the_right_size_keeps_its_bytes(processor):
    pixels = processor(images=picture())["pixel_values"]
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels[0].permute(1, 2, 0), torch.from_numpy(np.asarray(picture()).copy()))


def test_other_sizes_become_square_by_bicubic_resizing(processor):
    pixels = processor(images=[picture(90, 61), picture(1, 1)])["pixel_values"]
    expected = np.asarray(picture(90, 61).resize((48, 48), Image.Resampling.BICUBIC))
    assert pixels.shape == (2, 3, 48, 48)
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), expected)


def test_placeholders_come_first_then_padding_then_text(processor):
    batch = processor(text=["Question: how many circles are there? Answer:", "a circle"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert (ids[:, :5] == processor.image_token_id).all()
    assert (ids == processor.image_token_id).sum() == 10
    assert mask[:, :5].all()
    padding = int((mask[1] == 0).sum())
    assert padding > 0
    assert (mask[1, 5 : 5 + padding] == 0).all()
    assert mask[1, 5 + padding :].all()
    alone = processor(text="a circle")["input_ids"]
    assert torch.equal(ids[1, 5 + padding :], alone[0, 5:])


def test_placeholders_written_by_a_template_are_not_doubled(processor):
    assert torch.equal(processor(text="<image>a circle")["input_ids"], processor(text="a circle")["input_ids"])


def test_qformer_text_is_padded_on_the_right_and_cut_with_a_word_in_the_log(processor, caplog):
    batch = processor(qformer_text=["a circle", "circle " * 60])
    assert batch["qformer_input_ids"].shape == (2, MAX_CAPTION_TOKENS)
    assert batch["qformer_attention_mask"][0].tolist() == sorted(batch["qformer_attention_mask"][0].tolist())[::-1]
    assert "was cut to 32" in caplog.text


def test_an_empty_text_is_said(processor):
    with pytest.raises(ValueError, match="text for the Q-Former is empty"):
        processor(qformer_text=["a circle", "  "])


def test_nothing_to_process_is_said(processor):
    with pytest.raises(ValueError, match="give the processor images, text or qformer_text"):
        processor()


def test_a_missing_picture_is_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        processor(images=str(tmp_path / "nowhere.png"))


def test_saved_and_loaded_it_gives_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    XFormerConfig().save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, XFormerProcessor)
    inputs = {"images": picture(30, 50), "text": "Question: what? Answer:", "qformer_text": "a red circle"}
    a, b = processor(**inputs), again(**inputs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
