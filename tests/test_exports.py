"""Exports: official files that the benchmarks read, whose own answers score perfectly."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tyro

from xformer_mllm.embedded import exports
from xformer_mllm.embedded.benchmarks import EasyVqa, Photographs, Scenes
from xformer_mllm.embedded.commands import SceneExportConfig
from xformer_mllm.embedded.exports import FORMATS, export, vqa_answer_type, vqa_question_type
from xformer_mllm.embedded.gqa_export import entailed, equivalent, gqa_program
from xformer_mllm.embedded.scene_questions import PLURALS, ask, name
from xformer_mllm.embedded.scenes import caption
from xformer_mllm.embedded.world import HELD_OUT, draw_scene, render
from xformer_mllm.evaluate.caption_metrics import CaptionBenchmark
from xformer_mllm.evaluate.coco_captions import CocoCaptions
from xformer_mllm.evaluate.gqa import Gqa
from xformer_mllm.evaluate.gvt import GvtCounting, GvtIdentification
from xformer_mllm.evaluate.nocaps import NoCaps
from xformer_mllm.evaluate.ok_vqa import OkVqa
from xformer_mllm.evaluate.retrieval import CocoRetrieval, FlickrRetrieval, Retrieval
from xformer_mllm.evaluate.vqav2 import Vqav2

SIZE = 12
BENCHMARKS = {
    kind.name: kind
    for kind in (
        *(Vqav2, OkVqa, Gqa, CocoCaptions, NoCaps, GvtCounting, GvtIdentification),
        *(CocoRetrieval, FlickrRetrieval),
    )
}
# Of every split: in whose scenes its images are, counted from the first one.
SECOND = {("vqav2", "test-dev"), ("coco-captions", "val"), ("gvt-counting", "vcr"), ("gvt-identification", "vcr")}
SECOND |= {("coco-retrieval", "val"), ("flickr-retrieval", "val")}
SPLITS = [
    *(("vqav2", "val"), ("vqav2", "test-dev"), ("ok-vqa", "val"), ("gqa", "testdev"), ("gqa", "testdev-all")),
    *(("coco-captions", "test"), ("coco-captions", "val"), ("nocaps", "val")),
    *((kind, split) for kind in ("gvt-counting", "gvt-identification") for split in ("coco", "vcr")),
    *((kind, split) for kind in ("coco-retrieval", "flickr-retrieval") for split in ("test", "val")),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{name: folder} of every format."""
    root = tmp_path_factory.mktemp("exports")
    return {name: export(SceneExportConfig(name=name, output_dir=root / name, size=SIZE)) for name in FORMATS}


def content(folder, file):
    return json.loads((folder / file).read_text(encoding="utf-8"))


def scene_of(name, split, place):
    return draw_scene("test", place + (SIZE if (name, split) in SECOND else 0))


def kinds(value):
    """The shape of a JSON value: keys and types, the first entry of a list."""
    if isinstance(value, dict):
        return {key: kinds(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [kinds(value[0])] if value else []
    return type(value)


# ------------------------------------------------------------------------------------------------------ the benchmarks


def test_every_format_belongs_to_a_benchmark():
    assert set(FORMATS) == set(BENCHMARKS)
    assert {name for name, _ in SPLITS} == set(FORMATS)


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_a_benchmark_reads_its_export_and_its_images(exported, name, split):
    benchmark = BENCHMARKS[name](exported[name], split)
    images = dict.fromkeys(record.image_id for record in benchmark.records)
    assert len(images) == SIZE
    if name == "nocaps":  # its scenes are chosen by their domain
        return
    first = {record.image_id: record for record in reversed(benchmark.records)}
    for place, image_id in enumerate(images):
        seen = np.asarray(benchmark.load(first[image_id]), dtype=float)
        drawn = render(scene_of(name, split, place)).astype(float)
        assert abs(seen - drawn).mean() < 1.5, "JPEG has lost the textures"


WITH_TRUTH = [
    *(("vqav2", "val"), ("gqa", "testdev"), ("gqa", "testdev-all")),
    *((name, split) for name in ("gvt-counting", "gvt-identification") for split in ("coco", "vcr")),
]


@pytest.mark.parametrize(("name", "split"), WITH_TRUTH)
def test_the_truth_scores_perfectly(exported, name, split):
    benchmark = BENCHMARKS[name](exported[name], split)
    scores = benchmark.score({record.id: record.answer for record in benchmark.records})
    for group, found in scores.items():
        if not group.startswith("always "):
            assert found["accuracy"] == 1, group
    assert all(scores["all"].get(metric, 1) == 1 for metric in ("validity", "plausibility", "consistency"))
    assert scores["all"].get("distribution", 0) == 0
    wrong = benchmark.score({record.id: "zebra" for record in benchmark.records})
    assert wrong["all"]["accuracy"] == 0


def test_ok_vqa_wants_stems_and_raw_answers_say_so(exported):
    benchmark = OkVqa(exported["ok-vqa"], "val")
    stems = benchmark.score({record.id: record.answer for record in benchmark.records})
    assert stems["all"]["accuracy"] == 1
    words = {
        f"{place + 1}{number}": asked.answer
        for place in range(SIZE)
        for number, asked in enumerate(ask(draw_scene("test", place), exports.QUESTIONS_PER_IMAGE))
    }
    said = benchmark.score(words)
    assert said["raw answers"]["accuracy"] == 1
    assert said["all"]["accuracy"] < 1  # "striped" is not "stripe": the trap that docs/evaluation.md tells of


def test_the_gqa_export_has_consistency_and_choices(exported):
    benchmark = Gqa(exported["gqa"], "testdev-all")
    assert benchmark.not_computed == {}
    scores = benchmark.score({record.id: record.answer for record in benchmark.records})
    assert scores["all"]["n"] == SIZE * exports.QUESTIONS_PER_IMAGE < len(benchmark.records)
    always_no = benchmark.score({record.id: "no" for record in benchmark.records})
    assert 0 < always_no["all"]["consistency"] < 1
    assert 0 < always_no["all"]["validity"] < 1


@pytest.mark.parametrize(("name", "split"), [("coco-captions", "test"), ("nocaps", "val")])
def test_a_reference_is_a_perfect_caption(exported, name, split, monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "")  # no Java: it takes half a minute
    benchmark: CaptionBenchmark = BENCHMARKS[name](exported[name], split)
    scores = benchmark.score({record.id: benchmark.references[record.id][0] for record in benchmark.records})
    for group, found in scores.items():
        rouge = next(value for metric, value in found.items() if metric.startswith("ROUGE-L"))
        assert rouge == pytest.approx(1), group
        assert next(value for metric, value in found.items() if metric.startswith("BLEU-1")) == pytest.approx(1)
    assert list(scores) == (["all"] if name == "coco-captions" else ["all", *exports.DOMAINS])


@pytest.mark.parametrize("name", ["coco-retrieval", "flickr-retrieval"])
def test_retrieval_has_five_captions_of_each_image(exported, name):
    records = BENCHMARKS[name](exported[name], "test").records
    assert {len(record.captions) for record in records} == {5}
    assert [record.captions[0] for record in records] == [caption(draw_scene("test", n)) for n in range(SIZE)]


def test_the_guide_names_every_file_and_split(exported):
    guide = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for benchmark, folder in exported.items():
        kind = BENCHMARKS[benchmark]
        for word in (benchmark, *kind.splits):
            assert f"`{word}`" in guide, (benchmark, word)
        for path in folder.iterdir():
            assert path.name in guide or path.name == exports.EXPORT_FILE, (benchmark, path.name)


def test_the_guide_says_how_every_benchmark_asks():
    guide = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows, names = {}, ""
    for line in guide.splitlines():
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 7:
            names = cells[0] or names
            rows[names, cells[1].split(" ")[0].strip("`")] = cells[2:]
    told = {(name, setting): row for (names, setting), row in rows.items() for name in re.findall("`(.+?)`", names)}
    kinds = [kind for kind in (*BENCHMARKS.values(), EasyVqa, Scenes, Photographs) if not issubclass(kind, Retrieval)]
    assert set(told) == {(kind.name, setting) for kind in kinds for setting in kind.settings}
    for kind in kinds:
        assert [setting for name, setting in told if name == kind.name] == list(kind.settings), (
            "the default comes first"
        )
        for setting, asked in kind.settings.items():
            prompt = f"`{asked.prompt}`" if asked.prompt else "none"
            assert told[kind.name, setting] == [
                f"{prompt}, plain question" if asked.plain_question else prompt,
                str(asked.num_beams),
                f"{asked.length_penalty:g}".replace("-", "−") if asked.num_beams > 1 else "",
                f"{asked.min_new_tokens} to {asked.max_new_tokens}",
                f"{asked.repetition_penalty:g}",
            ]


# --------------------------------------------------------------------------------------------------- the official forms


def test_vqav2_has_the_official_form(exported):
    questions = content(exported["vqav2"], "v2_OpenEnded_mscoco_val2014_questions.json")
    annotations = content(exported["vqav2"], "v2_mscoco_val2014_annotations.json")
    assert kinds(questions["questions"]) == [{"image_id": int, "question": str, "question_id": int}]
    answer = {"answer": str, "answer_confidence": str, "answer_id": int}
    assert kinds(annotations["annotations"]) == [
        {
            "question_type": str,
            "multiple_choice_answer": str,
            "answers": [answer],
            "image_id": int,
            "answer_type": str,
            "question_id": int,
        }
    ]
    rows = annotations["annotations"]
    assert {len(row["answers"]) for row in rows} == {10}
    assert [answer["answer_id"] for answer in rows[0]["answers"]] == list(range(1, 11))
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in questions["questions"]]
    assert {row["question_id"] // 1000 for row in rows} == set(range(1, SIZE + 1))
    asked = [question for place in range(SIZE) for question in ask(draw_scene("test", place), 4)]
    assert [row["question"] for row in questions["questions"]] == [question.question for question in asked]
    assert [row["multiple_choice_answer"] for row in rows] == [question.answer for question in asked]
    assert {row["answer_type"] for row in rows} == {"yes/no", "number", "other"}
    assert any({"2", "two"} == {answer["answer"] for answer in row["answers"]} for row in rows)
    unanswered = content(exported["vqav2"], "v2_OpenEnded_mscoco_test-dev2015_questions.json")
    assert not set(kinds(unanswered["questions"])[0]) & {"answer", "answers"}
    for file in (questions, annotations, unanswered):
        assert {"info", "license", "data_type", "data_subtype"} <= set(file)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("How many circles are there in the image?", "how many"),
        ("What is the ground like?", "what is the"),
        ("What texture does the red circle have?", "what"),
        ("Is there a red cross or a blue square in the image?", "is there a"),
        ("Is the red circle small or large?", "is the"),
        ("Are there more circles than squares?", "are there"),
        ("Do the red cross and the blue square have the same texture?", "do"),
        ("Does a red circle exist in the image?", "none of the above"),
    ],
)
def test_question_types_are_vqas(question, kind):
    assert vqa_question_type(question) == kind


def test_answer_types_are_vqas():
    assert [vqa_answer_type(answer) for answer in ("yes", "no", "3", "red")] == ["yes/no", "yes/no", "number", "other"]


def test_ok_vqa_has_the_official_form(exported):
    annotations = content(exported["ok-vqa"], "mscoco_val2014_annotations.json")
    answer = {"answer_id": int, "raw_answer": str, "answer_confidence": str, "answer": str}
    assert kinds(annotations["annotations"]) == [
        {
            "image_id": int,
            "question_id": int,
            "answer_type": str,
            "question_type": str,
            "answers": [answer],
            "confidence": int,
        }
    ]
    assert set(annotations["question_types"]) == {
        *exports.NUMBER_WORDS.values(),
        *["seven", "eight", "nine", "ten", "other"],
    }
    questions = content(exported["ok-vqa"], "OpenEnded_mscoco_val2014_questions.json")["questions"]
    assert [row["question_id"] for row in annotations["annotations"]] == [row["question_id"] for row in questions]


def test_gqa_has_the_official_form(exported):
    balanced = content(exported["gqa"], "testdev_balanced_questions.json")
    every = content(exported["gqa"], "testdev_all_questions.json")
    keys = "semantic entailed equivalent question imageId isBalanced groups answer semanticStr annotations types fullAnswer"
    assert all(list(entry) == keys.split() for entry in every.values())
    entry = next(iter(balanced.values()))
    assert kinds(entry["semantic"]) == [{"operation": str, "dependencies": [], "argument": str}]
    assert set(entry["types"]) == {"detailed", "semantic", "structural"}
    assert set(entry["groups"]) == {"global", "local"}
    assert balanced == {name: entry for name, entry in every.items() if entry["isBalanced"]}
    assert all(name in every for entry in every.values() for name in [*entry["entailed"], *entry["equivalent"]])
    assert all(name in entry["equivalent"] and name not in entry["entailed"] for name, entry in every.items())
    assert all(set(entry["equivalent"]) - {name} <= set(entry["entailed"]) for name, entry in every.items())
    assert any(entry["entailed"] for entry in balanced.values())
    for steps in (entry["semantic"] for entry in every.values()):
        assert all(earlier < place for place, step in enumerate(steps) for earlier in step["dependencies"])
    assert set(content(exported["gqa"], "testdev_choices.json")) == set(every)
    assert {entry["types"]["semantic"] for entry in every.values()} == {"attr", "cat", "global", "obj", "rel"}
    assert {entry["types"]["structural"] for entry in every.values()} == {
        *("query", "verify", "choose", "compare", "logical")
    }


def test_the_program_of_a_question_is_written_as_gqas(exported):
    every = content(exported["gqa"], "testdev_all_questions.json")
    texts = {entry["question"]: entry["semanticStr"] for entry in every.values()}
    form = re.compile(r"Does a (\w+) (\w+) exist in the image\?")
    (colour, shape), text = next(
        (found.groups(), text) for words, text in texts.items() if (found := form.fullmatch(words))
    )
    assert text == f"select: {shape} (-)->filter color: {colour} [0]->exist: ? [1]"


def truth(scene, words):
    """The answer to an entailed or an equivalent question, found out from the scene itself."""
    things = {name(thing): thing for thing in scene.objects}
    shapes = Counter(thing.shape for thing in scene.objects)
    if found := re.fullmatch(r"Does a (\w+ \w+) exist in the image\?", words):
        return found[1] in things
    if found := re.fullmatch(r"Does a (\w+) (\w+ \w+) exist in the image\?", words):
        return found.groups() in {(thing.texture, name(thing)) for thing in scene.objects}
    if found := re.fullmatch(r"Is there a (\w+ \w+) (and|or) a (\w+ \w+) in the image\?", words):
        here, there = found[1] in things, found[3] in things
        return here and there if found[2] == "and" else here or there
    if found := re.fullmatch(r"Are there more (\w+) than (\w+)\?", words):
        more, fewer = (next(shape for shape in PLURALS if PLURALS[shape] == plural) for plural in found.groups())
        return shapes[more] > shapes[fewer]
    if found := re.fullmatch(r"Is the (\w+ \w+) left or right of the (\w+ \w+)\?", words):
        return "left" if things[found[1]].column < things[found[2]].column else "right"
    if found := re.fullmatch(r"Is the (\w+ \w+) above the (\w+ \w+)\?", words):
        return things[found[1]].row < things[found[2]].row
    found = re.fullmatch(r"Do the (\w+ \w+) and the (\w+ \w+) have the same texture\?", words)
    return things[found[1]].texture == things[found[2]].texture


def test_what_is_entailed_is_true():
    derived = Counter()
    for index in range(300):
        scene = draw_scene("test", index)
        for question in ask(scene, 12):
            if question.structural:
                for other in [*entailed(question), *equivalent(question)]:
                    expected = truth(scene, other.question)
                    assert other.answer == (expected if isinstance(expected, str) else ("no", "yes")[expected])
                    assert gqa_program(other)
                    derived[question.question_type] += 1
    assert set(derived) == {
        *("texture", "exists_texture", "colour", "shape", "size", "left_right", "above"),
        *("compare", "compare_texture", "logical"),
    }


def test_karpathys_files_have_their_form(exported):
    sentence = {"tokens": [str], "raw": str, "imgid": int, "sentid": int}
    shared = {"sentids": [int], "imgid": int, "sentences": [sentence], "split": str, "filename": str}
    coco = content(exported["coco-captions"], "dataset_coco.json")
    flickr = content(exported["flickr-retrieval"], "dataset_flickr30k.json")
    assert coco["dataset"] == "coco"
    assert kinds(coco["images"]) == [shared | {"filepath": str, "cocoid": int}]
    assert kinds(flickr["images"]) == [shared]
    assert Counter(image["split"] for image in coco["images"]) == {"test": SIZE, "val": SIZE}
    sentids = [sentence["sentid"] for image in coco["images"] for sentence in image["sentences"]]
    assert sentids == list(range(2 * SIZE * 5))
    assert coco == content(exported["coco-retrieval"], "dataset_coco.json")


def test_nocaps_domains_are_the_held_out_combinations(exported):
    file = content(exported["nocaps"], "nocaps_val_4500_captions.json")
    assert list(file) == ["licenses", "info", "images", "annotations"]
    assert kinds(file["images"])[0] == {
        **dict.fromkeys(("id", "height", "width", "license"), int),
        **dict.fromkeys(("open_images_id", "coco_url", "file_name", "date_captured", "domain"), str),
    }
    assert kinds(file["annotations"]) == [{"image_id": int, "id": int, "caption": str}]
    assert Counter(row["image_id"] for row in file["annotations"]) == dict.fromkeys(range(SIZE), 10)
    assert Counter(image["domain"] for image in file["images"]) == dict.fromkeys(exports.DOMAINS, SIZE // 3)


def test_a_domain_of_nocaps_is_what_training_scenes_do_not_hold(tmp_path, monkeypatch):
    scenes = []
    monkeypatch.setattr(exports, "render", lambda scene: scenes.append(scene) or render(scene))
    folder = export(SceneExportConfig(name="nocaps", output_dir=tmp_path / "nocaps", size=30))
    images = content(folder, "nocaps_val_4500_captions.json")["images"]
    assert len({scene.key for scene in scenes}) == len(images) == 30
    for image, scene in zip(images, scenes, strict=True):
        novel = [(thing.colour, thing.shape, thing.texture) in HELD_OUT for thing in scene.objects]
        expected = {"in-domain": not any(novel), "out-domain": all(novel), "near-domain": 0 < sum(novel) < len(novel)}
        assert expected[image["domain"]]


def test_gvts_lists_have_their_form_and_templates(exported):
    counting = content(exported["gvt-counting"], "coco_oc.json")
    there = content(exported["gvt-identification"], "vcr_mci.json")
    assert kinds(counting) == [{"image_id": int, "text_in": str, "text_out": str, "n_obj_exist": int}]
    assert kinds(there) == [{"image_id": str, "text_in": str, "text_out": str, "n_obj_exist": int}]
    for place, entry in enumerate(counting):
        scene = draw_scene("test", place)
        plural = re.fullmatch(r"How many (\w+) are there in the image\?", entry["text_in"])[1]
        assert entry["n_obj_exist"] == len(scene.objects)
        assert int(entry["text_out"]) == sum(plural.startswith(thing.shape) for thing in scene.objects) > 0
    for place, entry in enumerate(there):
        scene = draw_scene("test", SIZE + place)
        thing = re.fullmatch(r"Does (\w+ \w+) exist in the image\?", entry["text_in"])[1]
        assert entry["text_out"] == ("Yes." if thing in map(name, scene.objects) else "No.")
    assert len({entry["text_out"] for entry in there}) == 2


# ------------------------------------------------------------------------------------------------------------ the files


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_seed_split_and_size_make_an_export_and_nothing_else(tmp_path):
    def make(folder, **changes):
        settings = {"name": "gvt-counting", "size": 2, "seed": 3} | changes
        return files_of(export(SceneExportConfig(output_dir=tmp_path / folder, **settings)))

    assert make("a") == make("b")
    assert make("a") != make("c", seed=4)
    assert make("a") != make("d", split="validation")


def test_the_folder_is_named_as_it_was_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export(SceneExportConfig(name="gvt-counting", output_dir=Path("gvt"), size=1))
    assert capsys.readouterr().out == "gvt: 1 scenes as gvt-counting\n"


def test_the_same_export_is_kept_another_one_refused(tmp_path, capsys):
    config = SceneExportConfig(name="gvt-counting", output_dir=tmp_path / "gvt", size=1)
    before = {path: path.stat().st_mtime_ns for path in export(config).rglob("*")}
    export(config)
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*")} == before
    with pytest.raises(ValueError, match=r"gvt: not empty; name a new folder"):
        export(SceneExportConfig(name="gvt-counting", output_dir=tmp_path / "gvt", size=2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"mine: not empty"):
        export(SceneExportConfig(name="gqa", output_dir=tmp_path / "mine", size=1))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: is a file"):
        export(SceneExportConfig(name="gqa", output_dir=tmp_path / "file", size=1))


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    assert (export(SceneExportConfig(name="gqa", output_dir=tmp_path / "empty", size=1)) / "export.json").is_file()


def test_a_killed_export_leaves_nothing_and_can_be_run_again(tmp_path, monkeypatch):
    config = SceneExportConfig(name="vqav2", output_dir=tmp_path / "new" / "vqav2", size=2)
    drawn = []

    def stop_at_the_third(scene):
        drawn.append(scene)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return render(scene)

    with monkeypatch.context() as patched:
        patched.setattr(exports, "render", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            export(config)
    assert not config.output_dir.exists()
    assert len(Vqav2(export(config), "val").records) == 8
    assert [path.name for path in config.output_dir.parent.iterdir()] == ["vqav2"]


def test_the_command_line(tmp_path):
    words = ["ok-vqa", "--output-dir", str(tmp_path / "o"), "--size", "5", "--seed", "1", "--split", "validation"]
    config = tyro.cli(SceneExportConfig, args=words)
    assert config == SceneExportConfig(name="ok-vqa", output_dir=tmp_path / "o", size=5, seed=1, split="validation")
    with pytest.raises(ValueError, match="size must be at least 1, not 0"):
        SceneExportConfig(name="gqa", output_dir=tmp_path, size=0)
