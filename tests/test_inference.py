"""caption, ask, features and reconstruct through the real command line, on models that were never trained."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from xformer_mllm import defaults, inference
from xformer_mllm.checkpoints import load_model
from xformer_mllm.cli import main
from xformer_mllm.files import read_json_lines
from xformer_mllm.inference import KINDS, generate, open_image, readable


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.radial_gradient("L").convert("RGBA").save(path)
    return str(path)


def run(capsys, *words):
    """Exit code, stdout, stderr of `xformer WORDS`."""
    code = main([str(word) for word in words])
    output = capsys.readouterr()
    return code, output.out, output.err


def run_json(capsys, *words):
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    return json.loads(out)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_caption(runs, photo, capsys, stage):
    (row,) = run_json(capsys, "caption", photo, "--model", runs / stage)
    assert row["image"] == photo
    assert isinstance(row["caption"], str)
    assert "<" not in row["caption"]  # no special tokens
    code, out, _ = run(capsys, "caption", photo, "--model", runs / stage / "model")
    assert code == 0
    assert out.startswith(row["caption"] + "  (probability ")  # one image: the caption alone


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_captions_do_not_depend_on_the_batch(runs, photo, capsys, stage, monkeypatch):
    monkeypatch.setattr(inference, "bf16_is_fast", lambda: False)  # in bf16 another batch rounds differently
    images = [photo, "scene:test:0", "scene:test:1"]
    together = run_json(capsys, "caption", *images, "--model", runs / stage)
    alone = run_json(capsys, "caption", *images, "--model", runs / stage, "--batch-size", "1")
    assert [row["caption"] for row in together] == [row["caption"] for row in alone]
    assert [row["probability"] for row in together] == pytest.approx([row["probability"] for row in alone], rel=1e-3)
    assert [row["image"] for row in together] == images
    _, out, _ = run(capsys, "caption", *images, "--model", runs / stage)
    for line, row in zip(out.splitlines(), together, strict=True):
        assert line.startswith(f"{row['image']}: {row['caption']}  (probability ")


def test_max_new_tokens(runs, photo, capsys):
    texts = [
        run_json(capsys, "caption", photo, "--model", runs / "stage1", "--max-new-tokens", n)[0]["caption"]
        for n in (1, 8)
    ]
    assert len(texts[0]) < len(texts[1])
    assert texts[1].startswith(texts[0])


def test_ask(runs, capsys):
    questions = ["How many objects are there in the image?", "What colour is the circle?"]
    rows = run_json(capsys, "ask", "scene:test:3", *questions, "--model", runs / "stage2")
    assert [(row["image"], row["question"]) for row in rows] == [("scene:test:3", question) for question in questions]
    code, out, _ = run(capsys, "ask", "scene:test:3", questions[0], "--model", runs / "stage2")
    assert code == 0
    assert out.startswith(rows[0]["answer"] + "  (probability ")


def test_ask_answers_as_evaluate_does(runs, capsys, tmp_path):
    from xformer_mllm.evaluate import evaluation as run

    # A batch is the questions of one image in both, so that bf16 rounds the same way.
    config = run.EvaluateConfig(
        model=runs / "stage2", size=3, questions_per_image=2, batch_size=2, output_dir=tmp_path / "out"
    )
    run.evaluate(config)
    capsys.readouterr()
    rows = read_json_lines(tmp_path / "out" / "predictions.jsonl")
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        split, index = first["image_id"].split("/")[-2:]
        questions = [first["question"], second["question"]]
        asked = run_json(capsys, "ask", f"scene:{split}:{index}", *questions, "--model", runs / "stage2")
        assert [row["answer"] for row in asked] == [readable(row["prediction"]) for row in (first, second)]


def test_probability_is_that_of_the_answer(runs, monkeypatch):
    monkeypatch.setattr(inference, "bf16_is_fast", lambda: False)
    model, processor = load_model(runs / "stage2", KINDS)
    pixels = processor(images=[open_image("scene:test:3")])["pixel_values"]
    prompts = ["Question: What? Answer:", "Question: How many objects are there in the image? Answer:"]
    index = torch.zeros(2, dtype=torch.long)
    found = generate(model, processor, prompts, pixels, index, probabilities=True, max_new_tokens=4)
    for prompt, answer in zip(prompts, found, strict=True):
        text = processor(text=[prompt])
        read = model.generate(pixels, **text, max_new_tokens=4, do_sample=False)
        tokens = read[:, text["input_ids"].shape[1] :]
        logits = model(pixel_values=pixels, input_ids=read, attention_mask=torch.ones_like(read)).logits
        logs = logits[:, -tokens.shape[1] - 1 : -1].float().log_softmax(-1)
        expected = logs.gather(-1, tokens[..., None]).sum().exp().item()
        assert answer.probability == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" 6 6 6 6", "6"),
        ("11", "11"),
        ("a red red circle", "a red circle"),
        ("is island", "is island"),
        (" ", "(no text)"),
    ],
)
def test_repeated_words_and_empty_texts(text, shown):
    assert readable(text) == shown


def tensors_of(file):
    with safe_open(file, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118


def test_features(runs, photo, tmp_path, capsys):
    output = tmp_path / "new" / "features.safetensors"
    words = ("features", photo, "scene:test:0", "--model", runs / "stage2", "--output", output)
    found = run_json(capsys, *words, "--batch-size", "1")
    tensors, metadata = tensors_of(output)
    assert set(tensors) == {"clip_tokens", "mae_tokens", "queries", "fused_queries", "enriched_mae_tokens"}
    assert found["shapes"] == {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert all(tensor.shape[0] == 2 and tensor.isfinite().all() for tensor in tensors.values())
    assert not torch.equal(tensors["queries"], tensors["fused_queries"])
    assert json.loads(metadata["images"]) == [photo, "scene:test:0"]
    assert [path.name for path in output.parent.iterdir()] == ["features.safetensors"]  # nothing partial left

    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "fused_queries         [2, 12, 128]" in out
    batched, _ = tensors_of(output)
    torch.testing.assert_close(batched, tensors, rtol=1e-4, atol=1e-5)


def test_attention_maps_are_distributions(runs, photo, tmp_path, capsys):
    output = tmp_path / "features.safetensors"
    run_json(capsys, "features", photo, "--model", runs / "stage1", "--output", output, "--attention")
    tensors, _ = tensors_of(output)
    maps = [name for name in tensors if "attentions" in name]
    assert maps == ["clip_attentions.0", "clip_attentions.1", "mae_attentions.0"]
    for name in maps:
        torch.testing.assert_close(tensors[name].sum(-1), torch.ones(tensors[name].shape[:-1]))


def test_features_without_a_second_encoder(runs, photo, tmp_path, capsys):
    output = tmp_path / "features.safetensors"
    run_json(capsys, "features", photo, "--model", runs / "qformer", "--output", output)
    tensors, _ = tensors_of(output)
    assert set(tensors) == {"clip_tokens", "queries", "fused_queries"}
    assert torch.equal(tensors["queries"], tensors["fused_queries"])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_reconstruct(runs, tmp_path, capsys, stage):
    output = tmp_path / "panels.png"
    words = ("reconstruct", "scene:test:0", "scene:test:1", "--model", runs / stage, "--output", output)
    rows = run_json(capsys, *words)
    sheet = Image.open(output)
    assert sheet.format == "PNG"
    assert sheet.size == (8 + 4 * 200, 28 + 2 * 200)  # four panels of 4 x 48 pixels in each of two rows
    for row in rows:
        assert 0 < row["mae_error"] < 0.2
        assert row["mae_error"] != row["xformer_error"]

    panels = [sheet.crop((8 + 200 * i, 28, 8 + 200 * i + 192, 28 + 192)) for i in range(4)]
    original, masked, mae, xformer = (panel.resize((48, 48), Image.Resampling.NEAREST) for panel in panels)
    assert original.tobytes() == open_image("scene:test:0").tobytes()
    patches = [(x, y, x + 8, y + 8) for x in range(0, 48, 8) for y in range(0, 48, 8)]
    hidden = [box for box in patches if masked.crop(box).getcolors() == [(64, (128, 128, 128))]]
    assert len(hidden) == len(patches) // 2
    for box in patches:
        for painted in (mae, xformer):
            same = painted.crop(box).tobytes() == original.crop(box).tobytes()
            assert same == (box not in hidden)


def test_mask_depends_on_seed_and_ratio_alone(runs, tmp_path, capsys):
    def errors(*words):
        output = tmp_path / "panels.png"
        rows = run_json(capsys, "reconstruct", *words, "--model", runs / "stage1", "--output", output)
        return [(row["mae_error"], row["xformer_error"]) for row in rows]

    together = errors("scene:test:0", "scene:test:1")
    assert errors("scene:test:1")[0] == pytest.approx(together[1])
    assert errors("scene:test:1", "--seed", "1")[0] != pytest.approx(together[1])
    assert errors("scene:test:1", "--mask-ratio", "0.75")[0] != pytest.approx(together[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption", "missing.png", "--model", "stage2"], "missing.png: no such image"),
        (["caption", "--model", "stage2"], "at least one image"),
        (["caption", "scene:test", "--model", "stage2"], "scene:SPLIT:INDEX"),
        (["caption", "scene:moon:1", "--model", "stage2"], "unknown split 'moon'"),
        (["caption", "scene:test:1", "--model", "nothing"], "no trained model; name the folder of a run"),
        (["caption", "scene:test:1", "--model", "stage2", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["ask", "scene:test:1", "--model", "stage2"], "ask a question"),
        (["ask", "scene:test:1", " ", "--model", "stage2"], "ask a question"),
        (["ask", "scene:test:1", "What?", "", "--model", "stage2"], "question 2 of 2 is empty"),
        (["ask", "scene:test:1", "what " * 300, "--model", "stage2"], "the language model reads at most 256"),
        (["ask", "scene:test:1", "What?", "--model", "stage1"], "a stage-1 model; this needs a stage-2 one"),
        (["reconstruct", "scene:test:1", "--model", "qformer"], "no reconstruction"),
        (
            ["reconstruct", "scene:test:1", "--model", "stage1", "--mask-ratio", "1"],
            "--mask-ratio must be above 0 and below 1",
        ),
    ],
)
def test_errors_are_one_line(runs, capsys, words, message):
    place = words.index("--model") + 1
    code, out, err = run(capsys, *words[:place], runs / words[place], *words[place + 1 :])
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["features", "reconstruct"])
def test_output_must_not_be_a_folder(runs, tmp_path, capsys, command):
    (tmp_path / "folder").mkdir()
    words = (command, "scene:test:0", "--model", runs / "stage1", "--output", tmp_path / "folder")
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "folder: is a folder; name a file, e.g. --output " in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_caption_warns_of_a_model_trained_on_questions(runs, photo, tmp_path, capsys):
    shutil.copytree(runs / "stage2", tmp_path / "stage2")
    for text in ("captions", "questions"):
        (tmp_path / "stage2" / "config.json").write_text(json.dumps({"text": text}))
        words = ("caption", photo, "--model", tmp_path / "stage2", "--max-new-tokens", "500")  # OPT reads 256
        code, out, err = run(capsys, *words)
        assert code == 0
        assert out
        assert ("trained on questions" in err) == (text == "questions")


def test_the_shipped_models_are_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = str(defaults.example_images()[0])
    for command in (["caption", image], ["ask", image, "How many objects are there in the image?"]):
        code, out, err = run(capsys, *command)
        assert code == 0
        assert "(probability " in out
        assert "trained on" not in err
    for command in ("features", "reconstruct"):
        assert run(capsys, command, image)[0] == 0


def test_a_photo_is_no_scene(runs, photo, tmp_path, capsys):
    warning = "photo.png: not a scene; "
    assert warning in run(capsys, "ask", photo, "What?")[2]
    assert warning not in run(capsys, "ask", photo, "What?", "--model", runs / "stage2")[2]  # of an unknown run
    shutil.copytree(runs / "stage2", tmp_path / "stage2")
    for data in ("scenes", "hf:someone/images"):
        (tmp_path / "stage2" / "config.json").write_text(json.dumps({"data": data}))
        code, _, err = run(capsys, "ask", photo, "What?", "--model", tmp_path / "stage2")
        assert code == 0
        assert (warning in err) == (data == "scenes")


def test_caption_in_a_process(runs, photo):
    command = [sys.executable, "-m", "xformer_mllm", "caption", photo, "--model", str(runs / "stage2"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["image"] == photo
