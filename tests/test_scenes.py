"""The embedded world: reproducible, disjoint, truthful, and not answerable without looking."""

import hashlib
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from xformer_mllm import defaults
from xformer_mllm.embedded.scene_questions import DETAIL, EVENLY, QUESTION_TYPES, ask
from xformer_mllm.embedded.scenes import (
    ALT_TEXT,
    DETAILED,
    NUMBERS,
    WRITTEN,
    SceneCaptions,
    SceneQuestions,
    caption,
    description,
)
from xformer_mllm.embedded.world import HELD_OUT, SPLITS, TEXTURES, draw_scene, render

MANY = 6000
ENCODERS_TEXTS = "f8a7480c2831f68e80554a167c6a7534ea6a396cc58bd1ab52ef7ade7524501b"
TEXTS = "aa5d4370247182f84ba814ccb25ee569b658a87f615936c95b4a317090092689"
PIXEL_MEANS = [134.712, 104.473, 107.945, 138.194, 130.793]


@pytest.fixture(scope="module")
def asked():
    """split -> the questions of many scenes, drawn without rendering."""
    return {split: [q for i in range(MANY) for q in ask(draw_scene(split, i), 4)] for split in ("train", "test")}


def test_scenes_are_the_same_everywhere():
    scenes = [draw_scene(split, index) for split in SPLITS for index in range(20)]
    for named, types, digest in ((ALT_TEXT, EVENLY, ENCODERS_TEXTS), (WRITTEN, DETAIL, TEXTS)):
        asked = ["".join(q.question + q.answer for q in ask(s, 5, types)) for s in scenes]
        texts = [caption(s, named) + description(s) + questions for s, questions in zip(scenes, asked, strict=True)]
        assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == digest
    again = [draw_scene(split, index) for split in SPLITS for index in range(20)]
    assert all((render(a) == render(b)).all() for a, b in zip(scenes, again, strict=True))


def test_pixels_are_the_same_everywhere():
    """Means, not bits: a sine may differ in its last digit between machines."""
    means = [render(draw_scene("test", index)).mean() for index in range(5)]
    np.testing.assert_allclose(means, PIXEL_MEANS, atol=0.05)


def test_seed_and_index_matter():
    images = {render(draw_scene("train", i, seed)).tobytes() for i in range(50) for seed in (0, 1)}
    assert len(images) == 100


def test_splits_are_disjoint():
    images = {split: {render(draw_scene(split, i)).tobytes() for i in range(500)} for split in SPLITS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not images[a] & images[b]


def test_held_out_combinations_never_occur_in_training():
    def combinations(split):
        return {(t.colour, t.shape, t.texture) for i in range(MANY) for t in draw_scene(split, i).objects}

    assert len(HELD_OUT) == 6
    assert not combinations("train") & HELD_OUT
    assert combinations("train") | HELD_OUT == combinations("test") == combinations("validation")


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        SceneCaptions("dev", 3)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        SceneQuestions("dev", 3)


def test_caption_items():
    data = SceneCaptions("validation", 5)
    item = data[4]
    assert set(item) == {"id", "image", "caption"}
    assert item["id"] == "0/validation/4"
    assert (item["image"].mode, item["image"].size) == ("RGB", (48, 48))
    assert (np.asarray(item["image"]) == render(data.scene(4))).all()
    with pytest.raises(IndexError):
        data[5]
    assert len(list(data)) == 5


def test_question_items_of_a_scene_are_adjacent():
    data = SceneQuestions("validation", 3, questions_per_scene=4)
    items = list(data)
    assert len(items) == len(data) == 12
    assert [item["image_id"] for item in items] == [f"0/validation/{i // 4}" for i in range(12)]
    assert len({item["id"] for item in items}) == 12
    assert set(items[0]) == {
        *("id", "image_id", "image", "question", "answer", "question_type", "structural", "semantic", "answers")
    }


@pytest.mark.parametrize(("detail", "low", "high"), [(ALT_TEXT, 0.06, 0.12), (WRITTEN, 0.26, 0.36)])
def test_captions_leave_detail_out(detail, low, high):
    scenes = [draw_scene("train", i) for i in range(MANY)]
    texts = [caption(scene, detail) for scene in scenes]
    phrases = sum(1 + any(joint in text for joint in (" and ", " next to ", " with ")) for text in texts)
    textured = sum(word in TEXTURES for text in texts for word in text.split())
    sized_or_counted = sum(
        word in ("small", "large", "two", "three", "four", "five", "six") for t in texts for word in t.split()
    )
    assert low < textured / phrases < high
    assert 0.10 < sized_or_counted / phrases < 0.22
    assert 0.03 < np.mean([text.endswith("ground") for text in texts]) < 0.07
    assert np.mean([len(text.split()) for text in texts]) < 9


def test_detailed_captions_name_every_texture_that_a_group_shares():
    for i in range(500):
        scene = draw_scene("train", i)
        words = set(caption(scene, DETAILED).split())
        for colour, shape in {(t.colour, t.shape) for t in scene.objects}:
            textures = {t.texture for t in scene.objects if (t.colour, t.shape) == (colour, shape)}
            if len({(t.colour, t.shape) for t in scene.objects}) == 1 and len(textures) == 1:
                assert textures <= words


def test_the_data_scenes_detailed_has_them():
    detailed = defaults.captions("scenes-detailed", "train", 50)
    assert [item["caption"] for item in detailed] == [caption(draw_scene("train", i), DETAILED) for i in range(50)]
    plain, same = (defaults.questions(name, "train", 5, 4) for name in ("scenes", "scenes-detailed"))
    asked = [[[(q["question"], q["answer"]) for q in image] for image in data] for data in (plain, same)]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("detail", [WRITTEN, DETAILED])
def test_captions_are_true(detail):
    for i in range(2000):
        scene = draw_scene("test", i)
        words = caption(scene, detail).split()
        there = {word for t in scene.objects for word in (t.colour, t.shape, t.shape + "s", t.shape + "es", t.size)}
        there |= {t.texture for t in scene.objects} | {scene.ground}
        fill = {
            *["a", "photo", "picture", "of", "there", "is", "and", "next", "to", "with", "on", "ground"],
            *NUMBERS.values(),
        }
        assert set(words) <= there | fill


def test_descriptions_tell_everything():
    scene = draw_scene("test", 1)
    text = description(scene)
    assert text.count(",") == len(scene.objects)
    for thing in scene.objects:
        row, column = ("top", "middle", "bottom")[thing.row], ("left", "centre", "right")[thing.column]
        assert f"{thing.size} {thing.texture} {thing.colour} {thing.shape} {row} {column}" in text
    assert text.endswith(f"{scene.ground} ground")


def naive_answer(question: str, text: str) -> str:
    """The answer read off the full description by word matching: shares no code with the questions' own answers."""
    *phrases, last = text.split(" , ")
    things = [phrase.split() for phrase in phrases]  # size texture colour shape row column
    singular = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
    words = [singular.get(w, w) for w in question.rstrip("?").split()]

    def those(*wanted):
        return [thing for thing in things if all(word in thing[:4] for word in wanted)]

    def yes(truth):
        return "yes" if truth else "no"

    match words:
        case ["How", "many", "objects", *_]:
            return str(len(things))
        case ["How", "many", word, *_]:
            return str(len(those(word)))
        case ["Does", "a", *wanted, "exist", "in", "the", "image"]:
            return yes(those(*wanted))
        case ["What", "texture", "does", "the", colour, shape, "have"]:
            return those(colour, shape)[0][1]
        case ["What", "colour", "is", "the", shape]:
            return those(shape)[0][2]
        case ["What", "shape", "is", "the", colour, "object"]:
            return those(colour)[0][3]
        case ["Is", "the", c, s, "small", "or", "large"]:
            return those(c, s)[0][0]
        case ["Is", "the", c, s, "left", "or", "right", "of", "the", d, t]:
            order = ("left", "centre", "right")
            return "left" if order.index(those(c, s)[0][5]) < order.index(those(d, t)[0][5]) else "right"
        case ["Is", "the", c, s, "above", "the", d, t]:
            order = ("top", "middle", "bottom")
            return yes(order.index(those(c, s)[0][4]) < order.index(those(d, t)[0][4]))
        case ["Are", "there", "more", a, "than", b]:
            return yes(len(those(a)) > len(those(b)))
        case ["Do", "the", c, s, "and", "the", d, t, "have", "the", "same", "texture"]:
            return yes(those(c, s)[0][1] == those(d, t)[0][1])
        case ["Is", "there", "a", c, s, ("and" | "or") as word, "a", d, t, "in", "the", "image"]:
            both = (bool(those(c, s)), bool(those(d, t)))
            return yes(all(both) if word == "and" else any(both))
        case ["What", "is", "the", "ground", "like"]:
            return last.split()[0]
    raise AssertionError(f"unknown question {question!r}")


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true(split):
    seen = Counter()
    for i in range(1500):
        scene = draw_scene(split, i)
        for question in ask(scene, 5):
            assert naive_answer(question.question, description(scene)) == question.answer, question
            seen[question.question_type] += 1
    assert set(seen) == set(QUESTION_TYPES)


def test_questions_single_their_thing_out():
    for i in range(1500):
        scene = draw_scene("test", i)
        for q in ask(scene, 5):
            words = q.question.rstrip("?").split()
            if q.question_type in ("texture", "size"):
                at = words.index("the") + 1
                assert sum([t.colour, t.shape] == words[at : at + 2] for t in scene.objects) == 1, q


def test_answers_are_balanced(asked):
    # Scenes of few objects allow few types, and are asked for their number more often.
    limits = {"count_texture": 0.42, "count": 0.40, "count_all": 0.28}
    answers = defaultdict(Counter)
    for q in asked["test"]:
        answers[q.question_type][q.answer] += 1
    for kind, counts in answers.items():
        majority = max(counts.values()) / counts.total()
        assert majority < limits.get(kind, 1 / len(counts) + 0.06), (kind, counts)


def test_questions_do_not_give_their_answers_away(asked):
    """Fitted on train, scored on test: most frequent answer per question text, and naive Bayes over words."""
    by_text, by_word, prior = defaultdict(Counter), defaultdict(Counter), defaultdict(Counter)
    for q in asked["train"]:
        by_text[q.question][q.answer] += 1
        prior[q.question_type][q.answer] += 1
        for word in set(q.question.split()):
            by_word[q.question_type, word][q.answer] += 1
    right, majority, total = defaultdict(Counter), Counter(), Counter()
    for q in asked["test"]:
        kind, answers = q.question_type, prior[q.question_type]
        total[kind] += 1
        majority[kind] += answers.most_common(1)[0][0] == q.answer
        text_guess = (by_text[q.question] or answers).most_common(1)[0][0]

        words = set(q.question.split())

        def likelihood(answer, kind=kind, answers=answers, words=words):
            logs = [math.log((by_word[kind, w][answer] + 1) / (answers[answer] + 2)) for w in words]
            return math.log(answers[answer]) + sum(logs)

        right["text"][kind] += text_guess == q.answer
        right["words"][kind] += max(answers, key=likelihood) == q.answer
    for baseline, counts in right.items():
        for kind in total:
            gain = (counts[kind] - majority[kind]) / total[kind]
            noise = 2 * math.sqrt(0.25 / total[kind])
            assert gain < 0.05 + (noise if total[kind] < 1000 else 0), (baseline, kind, gain, total[kind])


def test_gqa_types_are_all_there():
    structural = {form[1] for form in QUESTION_TYPES.values()}
    semantic = {form[2] for form in QUESTION_TYPES.values()}
    assert structural == {"query", "verify", "choose", "compare", "logical", None}
    assert semantic == {"object", "attribute", "category", "relation", "global", None}


def test_textures_share_their_mean_colour():
    """So that no pooled colour gives a texture away: the mean over objects of a texture differs little."""
    means = defaultdict(list)
    for i in range(3000):
        scene = draw_scene("test", i)
        if len(scene.objects) == 1:
            means[scene.objects[0].texture].append(render(scene).mean())
    overall = np.concatenate(list(means.values()))
    for values in means.values():
        assert abs(np.mean(values) - overall.mean()) < 4 * overall.std() / math.sqrt(len(values))
