"""Photographic scenes: reproducible, their cut-outs disjoint between splits, truthful, not answerable without looking.

The stamps are drawn here; the real ones are a Debian package.
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from xformer_mllm import defaults
from xformer_mllm.cli import main
from xformer_mllm.commands import BenchmarkConfig
from xformer_mllm.embedded import encoders, photographs
from xformer_mllm.embedded.commands import ClipConfig, DemoConfig, LmConfig, MaeConfig, ProbeConfig
from xformer_mllm.embedded.demo import jobs_of
from xformer_mllm.embedded.photographs import (
    CATEGORIES,
    FOLDER_VARIABLE,
    IMAGE_SIZE,
    PHOTOGRAPHS,
    PLURALS,
    caption,
    description,
    draw_photograph,
    questions,
    render,
    stamps,
)
from xformer_mllm.embedded.probe import run_probe
from xformer_mllm.embedded.scenes import ALT_TEXT, WRITTEN
from xformer_mllm.embedded.start import start_pretraining
from xformer_mllm.embedded.tokenizers import lm_tokenizer
from xformer_mllm.embedded.world import SPLITS
from xformer_mllm.evaluate.evaluation import open_benchmark

NAMES = ("amber", "brown", "coral", "dark", "early", "fine", "green")
MANY = 1500


def write_stamp(path, text, rng):
    """A speckled ellipse on a transparent ground."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = rng.integers(40, 80, 2)
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., :3] = rng.integers(0, 256, (height, width, 3))
    image = Image.fromarray(pixels)
    alpha = Image.new("L", image.size)
    ImageDraw.Draw(alpha).ellipse((2, 2, width - 3, height - 3), fill=255)
    image.putalpha(alpha)
    image.save(path)
    if text:
        path.with_suffix(".txt").write_text(f"{text}\nde.utf8=Etwas.\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("stamps"), np.random.default_rng(0)
    for category, places in CATEGORIES.items():
        for number, name in enumerate(NAMES):
            write_stamp(folder / places[0] / "real" / f"{number}.png", f"A {name} {category}.", rng)
        write_stamp(folder / places[0] / "again.png", f"A coral {category}.", rng)
        write_stamp(folder / places[0] / "cartoon" / "drawn.png", "A drawing.", rng)
        write_stamp(folder / places[0] / "unnamed.png", None, rng)
    write_stamp(folder / "town" / "house.png", "A house.", rng)
    return folder


@pytest.fixture(autouse=True)
def _stamps(folder, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))


def test_categories_are_folders_and_names_are_texts():
    for category in CATEGORIES:
        names = {split: sorted(stamp.name for stamp in stamps()[split][category]) for split in SPLITS}
        assert names["test"] == [f"coral {category}"] * 2  # both files of that name
        assert names["validation"] == [f"early {category}"]
        assert names["train"] == [f"{name} {category}" for name in ("amber", "brown", "dark", "fine", "green")]


@pytest.mark.parametrize(
    ("text", "file", "name"),
    [
        ("A crowned crane.", "x", "crowned crane"),
        ("An owl", "x", "owl"),
        ("Eat your broccoli!", "broccoli", "broccoli"),
        ("A wheel! Put it in the front.", "7spoke256", "spoke"),
        ("A European coin of 1 cent.", "001", "coin"),
        ("A big-eared rabbit.", "x", "big eared rabbit"),
    ],
)
def test_names(tmp_path, text, file, name):
    (tmp_path / f"{file}.txt").write_text(text)
    assert photographs._name(tmp_path / f"{file}.png") == name


def test_training_shows_no_cut_out_of_the_tests():
    shown = {
        split: {obj.stamp.path for i in range(400) for obj in draw_photograph(split, i).objects} for split in SPLITS
    }
    assert not shown["train"] & shown["test"]
    assert not shown["train"] & shown["validation"]
    assert not shown["validation"] & shown["test"]
    for split, paths in shown.items():
        assert paths == {stamp.path for found in stamps()[split].values() for stamp in found}


def test_a_photograph_is_the_same_at_every_call():
    one, other = draw_photograph("train", 7), draw_photograph("train", 7)
    assert one == other
    assert one.key == "photographs/0/train/7"
    assert (render(one) == render(other)).all()
    assert render(one).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert len({render(draw_photograph("train", i, seed)).tobytes() for i in range(20) for seed in (0, 1)}) == 40
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        draw_photograph("dev", 0)


def test_an_object_stays_in_its_cell():
    """Mirroring it changes no pixel outside."""
    photograph = next(p for i in range(99) if len((p := draw_photograph("train", i)).objects) == 1)
    obj = photograph.objects[0]
    mirrored = replace(photograph, objects=(replace(obj, mirrored=not obj.mirrored),))
    changed = (render(photograph) != render(mirrored)).any(-1)
    cell = IMAGE_SIZE // 3
    inside = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    inside[obj.row * cell : (obj.row + 1) * cell, obj.column * cell : (obj.column + 1) * cell] = True
    assert changed[inside].mean() > 0.1
    assert not changed[~inside].any()


def test_blurred_objects_have_less_detail_and_the_same_colour():
    photograph = next(p for i in range(99) if len((p := draw_photograph("train", i)).objects) == 1)

    def pixels(focus):
        found = photographs._pixels(photograph.objects[0].stamp.path, 28, focus == "blurred").astype(float)
        return found[10:20, 10:20, :3]

    sharp, blurred = pixels("sharp"), pixels("blurred")
    assert np.abs(np.diff(blurred, axis=0)).mean() < 0.6 * np.abs(np.diff(sharp, axis=0)).mean()
    np.testing.assert_allclose(sharp.mean(), blurred.mean(), rtol=0.1)


def is_true(question, photograph):
    """The answer from the words of the question and the objects, by other means than `photographs`."""
    objects = [(obj.focus, obj.stamp.path.relative_to(stamps_root()).as_posix()) for obj in photograph.objects]
    kinds = [
        (focus, next(c for c, places in CATEGORIES.items() if path.startswith(places[0]))) for focus, path in objects
    ]
    words = re.findall(r"[a-z]+", question.lower())
    focus = [word for word in words if word in ("sharp", "blurred")]
    category = [c for c in CATEGORIES if c in words or PLURALS[c] in words]
    if words[0] == "of":
        return Counter(c for _, c in kinds).most_common(1)[0][0]
    if words[0] == "is":
        return next(f for f, c in kinds if c == category[0])
    fitting = [1 for f, c in kinds if (not focus or f in focus) and (not category or c in category)]
    return ("yes" if fitting else "no") if words[0] == "does" else str(len(fitting))


def stamps_root():
    return next(iter(stamps()["train"]["bird"])).path.parents[3]


def test_answers_are_true():
    kinds = set()
    for index in range(300):
        photograph = draw_photograph("test", index)
        for question in questions(photograph, 4):
            assert question.answer == is_true(question.question, photograph), question
            kinds.add(question.question_type)
    assert kinds == set(photographs.QUESTION_TYPES)


def test_questions_do_not_tell_their_answers():
    """The most frequent answer to the words of a question is hardly better than that to its type."""
    asked = {
        split: [q for i in range(MANY) for q in questions(draw_photograph(split, i), 4)] for split in ("train", "test")
    }
    by_text, by_type = defaultdict(Counter), defaultdict(Counter)
    for question in asked["train"]:
        by_text[question.question][question.answer] += 1
        by_type[question.question_type][question.answer] += 1
    for kind, answers in by_type.items():
        some = [q for q in asked["test"] if q.question_type == kind]
        blind = np.mean([by_text[q.question].most_common(1)[0][0] == q.answer for q in some if by_text[q.question]])
        majority = answers.most_common(1)[0][1] / answers.total()
        assert blind < majority + 0.07, kind
        assert majority < 0.55, kind


def test_captions_name_what_is_there_and_seldom_its_focus():
    named = Counter()
    for index in range(MANY):
        photograph = draw_photograph("train", index)
        for detail, name in ((ALT_TEXT, "alt"), (WRITTEN, "written")):
            text = caption(photograph, detail)
            named[name] += "sharp" in text or "blurred" in text
            words = text.split()
            there = {obj.category for obj in photograph.objects}
            assert {c for c in CATEGORIES if {c, PLURALS[c]} & set(words)} <= there
            focus = {word for word in words if word in ("sharp", "blurred")}
            assert focus <= {obj.focus for obj in photograph.objects}
    assert named["alt"] < 0.25 * MANY < named["written"]


def test_a_description_is_complete():
    photograph = draw_photograph("train", 3)
    wanted = [f"{obj.focus} {obj.stamp.name} {obj.category}" for obj in photograph.objects]
    assert description(photograph).split(" , ") == wanted


@pytest.mark.parametrize("how", ["missing", "few"])
def test_without_stamps_the_package_is_named(tmp_path, monkeypatch, capsys, how):
    wanted = tmp_path / how
    if how == "few":
        write_stamp(wanted / "animals" / "birds" / "a.png", "A bird.", np.random.default_rng(0))
    monkeypatch.setenv(FOLDER_VARIABLE, str(wanted))
    words = ["train", "stage1", "--data", "photographs", "--output-dir", str(tmp_path / "run")]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"xformer: {wanted}: ")
    assert "apt-get install tuxpaint-stamps-default, or set XFORMER_STAMPS" in said


def test_as_data_and_benchmark():
    train = defaults.captions("photographs", "train", 6)
    assert [train[i]["id"] for i in (0, 5)] == ["photographs/0/train/0", "photographs/0/train/5"]
    assert train[5]["image"].size == (IMAGE_SIZE, IMAGE_SIZE)
    asked = defaults.questions("photographs", "train", 3, 4)
    assert [len(asked[i]) for i in range(3)] == [4, 4, 4]
    benchmark = open_benchmark(BenchmarkConfig(benchmark="photographs", size=5))
    assert len(benchmark.records) == 20
    assert benchmark.load(benchmark.records[4]).tobytes() == render(draw_photograph("test", 1)).tobytes()
    assert list(defaults.test_images("photographs", 2)) == ["photographs/0/test/0", "photographs/0/test/1"]


def test_encoders_of_photographs_start_a_stage_1(tmp_path):
    encoders.save_qformer_tokenizer(tmp_path, "photographs")
    small = {"steps": 2, "batch_size": 4, "width": 16}
    encoders.train_clip(ClipConfig(**small), tmp_path, "photographs")
    encoders.train_mae(MaeConfig(**small), tmp_path, "photographs")
    model, processor = start_pretraining("xformer", encoders=tmp_path)
    item = defaults.captions("photographs", "train", 1)[0]
    pixels = processor(images=[item["image"]])["pixel_values"]
    assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(pixels[0].permute(1, 2, 0), torch.from_numpy(render(draw_photograph("train", 0))))
    assert model.xformer(pixels).mae_tokens.shape == (1, 37, 16)
    assert processor.qformer_tokenizer.unk_token_id not in processor.qformer_tokenizer(item["caption"])["input_ids"]


def test_the_probe_of_photographs(tmp_path):
    small = {"steps": 1, "batch_size": 4, "width": 16}
    encoders.train_clip(ClipConfig(**small), tmp_path, "photographs")
    encoders.train_mae(MaeConfig(**small), tmp_path, "photographs")
    config = ProbeConfig(data="photographs", encoders=tmp_path, train=60, validation=30, test=30, epochs=1, width=16)
    record = run_probe(config, output=tmp_path)
    assert set(record["results"]) == set(photographs.QUESTION_TYPES)
    assert record["command"] == f"xformer data probe --data photographs --encoders {tmp_path}"
    assert "| focus |" in (tmp_path / "probe-photographs.md").read_text()
    with pytest.raises(ValueError, match="--attributes texture: not a type of question; choose from count_all"):
        run_probe(replace(config, attributes=("texture",)), output=tmp_path)


def test_the_language_model_reads_descriptions_of_photographs():
    tokenizer = lm_tokenizer(PHOTOGRAPHS)
    segments = encoders.scene_text(3, LmConfig(data="photographs", seed=1), tokenizer)
    assert len(segments) == 10  # description, eight questions, caption
    words = set(tokenizer.decode(segments[0][0]).replace(",", "").split())
    assert words <= set(description(draw_photograph("train", 3)).split())
    assert not any(
        "##" in piece for piece in tokenizer.tokenize(" ".join(f"{a} {b}" for a in NAMES for b in CATEGORIES))
    )


def test_the_demo_of_photographs(tmp_path):
    with pytest.raises(ValueError, match="xformer train encoders --data photographs --output DIR"):
        DemoConfig(data="photographs")
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt" / "recipe.json").write_text("{}")
    config = DemoConfig(data="photographs", encoders=tmp_path, llm=str(tmp_path / "opt"))
    first, second, asked = jobs_of(config, "xformer")
    assert first.arguments[first.arguments.index("--encoders") + 1] == str(tmp_path)
    assert first.arguments[first.arguments.index("--data") + 1] == "photographs"
    assert second.steps == 800
    assert "--batch-size" not in second.arguments
    assert asked.arguments[3] == "photographs"
