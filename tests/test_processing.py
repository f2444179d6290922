"""Images and texts through the processor, as each consumer needs them."""

import base64
import functools
import http.server
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from xformer_mllm import XFormerConfig
from xformer_mllm.data.questions import QUESTION_PROMPT
from xformer_mllm.embedded.start import WEIGHTS
from xformer_mllm.model.processing_xformer import MAX_CAPTION_TOKENS, XFormerProcessor, image_processor
from xformer_mllm.train.batches import Stage1Collator, Stage2Collator


@pytest.fixture
def processor():
    qformer = AutoTokenizer.from_pretrained(WEIGHTS / "qformer_tokenizer")
    return XFormerProcessor(image_processor(48), AutoTokenizer.from_pretrained(WEIGHTS / "opt"), qformer, 5)


def image(width=48, height=48):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_image_of_the_right_size_keeps_its_bytes(processor):
    pixels = processor(images=image())["pixel_values"]
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels[0].permute(1, 2, 0), torch.from_numpy(np.asarray(image()).copy()))


def test_other_sizes_become_square_by_bicubic_resizing(processor):
    pixels = processor(images=[image(90, 61), image(1, 1)])["pixel_values"]
    expected = np.asarray(image(90, 61).resize((48, 48), Image.Resampling.BICUBIC))
    assert pixels.shape == (2, 3, 48, 48)
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), expected)


def test_padding_then_placeholders_then_text(processor):
    batch = processor(text=["Question: how many circles are there? Answer:", "a circle"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert (ids == processor.image_token_id).sum(-1).tolist() == [5, 5]
    assert mask[0].all()
    padding = int((mask[1] == 0).sum())
    assert padding > 0
    assert mask[1].tolist() == [0] * padding + [1] * (len(mask[1]) - padding)
    assert (ids[1, padding : padding + 5] == processor.image_token_id).all()
    assert torch.equal(ids[1, padding:], processor(text="a circle")["input_ids"][0])


def test_an_encoders_text_is_padded_on_the_right(processor):
    texts = ["Question: how many circles are there? Answer:", "a circle"]
    left = processor(text=texts)
    processor.encoder_decoder = True
    right = processor(text=texts)
    rows = zip(left["input_ids"], left["attention_mask"], right["input_ids"], right["attention_mask"], strict=True)
    for ids, mask, other_ids, other_mask in rows:
        assert torch.equal(ids[mask == 1], other_ids[other_mask == 1])
        assert other_mask.tolist() == sorted(other_mask.tolist(), reverse=True)


def test_a_prompt_is_cut_and_padded_to_max_length(processor, caplog):
    texts = ["a red circle left of a blue square", "a circle"]
    whole = processor(text=texts[0])["input_ids"][0]
    batch = processor(text=texts, padding="max_length", max_length=5)
    assert batch["input_ids"].shape == (2, 10)
    assert torch.equal(batch["input_ids"][0], whole[:10])
    assert batch["attention_mask"].sum(-1).tolist() == [10, 8]
    assert "was truncated to 10" in caplog.text


def test_a_chat_template_is_around_the_prompt_and_is_never_cut(processor, tmp_path):
    prompt, turn = "how many circles are there?", ["a red", " a blue", ""]
    inside = processor.tokenizer(["a red", prompt, "a blue"], add_special_tokens=False)["input_ids"]
    placeholders = [processor.image_token_id] * 5
    processor.turn = turn
    assert processor.prompt_ids([prompt]) == [[*inside[0], *placeholders, *inside[1], *inside[2]]]
    cut = processor(text=prompt, max_length=6)["input_ids"][0].tolist()
    assert cut == [*inside[0], *placeholders, *inside[1][:2], *inside[2]]
    processor.save_pretrained(tmp_path)
    again = XFormerProcessor.from_pretrained(tmp_path)
    assert again.turn == turn
    assert again.prompt_ids([prompt]) == processor.prompt_ids([prompt])


def test_placeholders_written_by_a_template_are_not_doubled(processor):
    assert torch.equal(processor(text="<image>a circle")["input_ids"], processor(text="a circle")["input_ids"])


def test_a_text_that_names_the_placeholder_holds_none(processor):
    """A caption of the web may; the Q-Former has no embedding for it, and each more would ask for another image."""
    asked = processor(qformer_text=["a <image> circle"])["qformer_input_ids"]
    assert torch.equal(asked, processor(qformer_text=["a  circle"])["qformer_input_ids"])
    assert processor.target_ids(["<image>a"], ["a <image> circle"]) == processor.target_ids(["a"], ["a  circle"])
    processor.instruction_aware = True
    batch = processor(text="<image>a circle")
    assert torch.equal(batch["qformer_input_ids"], processor(text="a circle")["qformer_input_ids"])
    items = [{"id": "0", "image": image(), "caption": "a red <image> circle"}]
    for collator in (Stage1Collator(processor, 32), Stage2Collator(processor, 2, 32)):
        batch = collator(items)
        assert processor.image_token_id not in batch["qformer_input_ids"]
        if "input_ids" in batch:
            assert (batch["input_ids"] == processor.image_token_id).sum() == processor.num_query_tokens
    with pytest.raises(ValueError, match="0: empty caption"):
        Stage1Collator(processor, 32)([{"id": "0", "image": image(), "caption": "<image> "}])


def test_qformer_text_is_padded_right_and_truncation_logged(processor, caplog):
    batch = processor(qformer_text=["a circle", "circle " * 60])
    assert batch["qformer_input_ids"].shape == (2, MAX_CAPTION_TOKENS)
    assert batch["qformer_attention_mask"][0].tolist() == sorted(batch["qformer_attention_mask"][0].tolist())[::-1]
    assert "was truncated to 32" in caplog.text


def test_an_empty_text_is_said(processor):
    with pytest.raises(ValueError, match="text for the Q-Former is empty"):
        processor(qformer_text=["a circle", "  "])


def test_nothing_to_process_is_said(processor):
    with pytest.raises(ValueError, match="pass images, text or qformer_text"):
        processor()


@pytest.mark.parametrize("name", ["images", "text", "qformer_text"])
def test_an_empty_list_is_said(processor, name):
    with pytest.raises(ValueError, match=f"^{name} is empty; pass at least one"):
        processor(**{name: []})


@pytest.mark.parametrize("name", ["text", "qformer_text"])
def test_what_is_no_text_is_said(processor, name):
    with pytest.raises(TypeError, match=f"^{name} must be a str or a list of str; it contains a NoneType"):
        processor(**{name: ["a circle", None]})


def test_images_come_as_transformers_processors_take_them(processor, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    encoded = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    expected = processor(images=image)["pixel_values"]
    first = torch.from_numpy(pixels).permute(2, 0, 1)
    for form in (
        str(tmp_path / "a.png"),
        encoded,
        [[image]],
        pixels,
        first,
        first.float() / 255,
        first[None],
        [pixels],
    ):
        assert torch.equal(processor(images=form)["pixel_values"], expected)
    several = processor(images=[[image], [pixels, encoded], (image,)])["pixel_values"]
    assert torch.equal(several, expected.expand(4, -1, -1, -1))
    assert torch.equal(processor(images=torch.stack([first] * 2))["pixel_values"], expected.expand(2, -1, -1, -1))


def test_images_of_an_address_are_fetched(processor, tmp_path):
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fetched = processor(images=f"http://127.0.0.1:{server.server_port}/a.png")["pixel_values"]
        server.shutdown()
    assert torch.equal(fetched, processor(images=tmp_path / "a.png")["pixel_values"])


PROMPTS = ["Question: one? Answer:", "Question: how many small red circles? Answer:"]


def test_padding_and_truncation_are_obeyed(processor):
    rows = processor(text=PROMPTS, padding=False, return_tensors=None)["input_ids"]
    assert len(rows[0]) < len(rows[1])
    longest = len(rows[1])
    left, right = (processor(text=PROMPTS, padding_side=side) for side in ("left", "right"))
    assert left["attention_mask"][0].tolist() == [0] * (longest - len(rows[0])) + [1] * len(rows[0])
    assert right["attention_mask"][0].tolist() == [1] * len(rows[0]) + [0] * (longest - len(rows[0]))
    assert right["input_ids"][0, : len(rows[0])].tolist() == rows[0]
    assert processor(text=PROMPTS, pad_to_multiple_of=64)["input_ids"].shape[1] % 64 == 0
    assert torch.equal(processor(text=PROMPTS, text_kwargs={"padding_side": "right"})["input_ids"], right["input_ids"])
    assert processor(text=PROMPTS, max_length=3, truncation=False)["input_ids"].shape[1] == longest
    assert processor(text=PROMPTS, max_length=3)["input_ids"].shape[1] < longest
    many = "circle " * 40
    short, whole = (processor(qformer_text=many, truncation=cut)["qformer_input_ids"] for cut in (None, False))
    assert short.shape[1] == 32 < whole.shape[1]
    assert isinstance(processor(text=PROMPTS, return_tensors="np")["input_ids"], np.ndarray)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"paddding": True}, TypeError, "paddding"),
        ({"text_kwargs": {"paddding": True}}, TypeError, "paddding"),
        ({"padding": "longer"}, ValueError, "padding must be True"),
        ({"padding_side": "top"}, ValueError, "padding_side must be"),
        ({"truncation": True}, ValueError, "pass max_length"),
        ({"padding": "max_length"}, ValueError, "pass max_length"),
        ({"videos": [1]}, ValueError, "no videos"),
    ],
)
def test_unknown_settings_of_the_processor_are_refused(processor, wrong, error, message):
    with pytest.raises(error, match=message):
        processor(text=PROMPTS, **wrong)


def messages(*parts, role="user"):
    return [{"role": role, "content": list(parts)}]


def test_a_chat_template_gives_the_prompt_of_training(processor, tmp_path):
    image = Image.new("RGB", (48, 48), "red")
    asked = messages({"type": "image", "image": image}, {"type": "text", "text": "How many?"})
    prompt = QUESTION_PROMPT.format(question="How many?")
    assert processor.apply_chat_template(asked) == prompt
    assert processor.apply_chat_template([{"role": "user", "content": "How many?"}]) == prompt
    assert processor.apply_chat_template(messages({"type": "image", "image": image})) == ""
    inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True)
    expected = processor(images=image, text=prompt)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    for refused in ([*asked, *asked], messages({"type": "text", "text": "hi"}, role="system")):
        with pytest.raises(Exception, match="one question about one image"):
            processor.apply_chat_template(refused)
    processor.chat_template = "{{ messages[0].content[-1].text }}"
    processor.save_pretrained(tmp_path)
    XFormerConfig().save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).apply_chat_template(asked) == "How many?"


def test_a_missing_image_is_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        processor(images=str(tmp_path / "nowhere.png"))


def test_saved_and_loaded_it_gives_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    XFormerConfig().save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, XFormerProcessor)
    inputs = {"images": image(30, 50), "text": "Question: what? Answer:", "qformer_text": "a red circle"}
    a, b = processor(**inputs), again(**inputs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
