"""GQA's records of the scenes' questions: programs, entailed and equivalent questions, and choices of answers.

`exports.py` writes the files. Format: GQA's own eval.py.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.scene_questions import QUESTION_TYPES, ask, name
from xformer_mllm.embedded.world import COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES, Scene

GQA_SEMANTIC = {"object": "obj", "attribute": "attr", "category": "cat", "relation": "rel", "global": "global"}


class GqaForm(NamedTuple):
    """How GQA describes a type of question.

    Args:
        wording: regular expression of the question as `scene_questions` words it; its groups are the objects and values.
        detailed: GQA's detailed type.
        program: GQA's semanticStr. {0[1]} is the second word of the first group, the shape of "red circle"; "(-)" is
            GQA's mark of an object without an id.
        group: GQA's global group, whose answers the distribution score counts; None for yes/no questions.
        answers: the valid answers.
        full_answer: the answer as a sentence; {0} is the first group.
    """

    wording: str
    detailed: str
    program: str
    group: str | None = None
    answers: tuple[str, ...] = ("yes", "no")
    full_answer: str = "{answer}."


_FIRST = "select: {0[1]} (-)->filter color: {0[0]} [0]"
_SECOND = "select: {1[1]} (-)->filter color: {1[0]} [0]"
_FORMS = {
    "exists": GqaForm(r"Does a (\w+ \w+) exist in the image\?", "exist", f"{_FIRST}->exist: ? [1]"),
    "exists_texture": GqaForm(
        r"Does a (\w+) (\w+ \w+) exist in the image\?",
        "existAttr",
        f"{_SECOND}->filter pattern: {{0[0]}} [1]->exist: ? [2]",
    ),
    "texture": GqaForm(
        r"What texture does the (\w+ \w+) have\?",
        "directOf",
        f"{_FIRST}->query: pattern [1]",
        *("texture", TEXTURES, "The {0} is {answer}."),
    ),
    "colour": GqaForm(
        r"What colour is the (\w+)\?",
        "directOf",
        "select: {0[0]} (-)->query: color [0]",
        *("color", tuple(COLOURS), "The {0} is {answer}."),
    ),
    "shape": GqaForm(
        r"What shape is the (\w+) object\?",
        "categoryAttr",
        "select: object (-)->filter color: {0[0]} [0]->query: name [1]",
        *("shape", SHAPES, "The {0} object is a {answer}."),
    ),
    "size": GqaForm(
        r"Is the (\w+ \w+) small or large\?",
        "chooseAttr",
        f"{_FIRST}->choose size: {'|'.join(SIZES)} [1]",
        *("size", tuple(SIZES), "The {0} is {answer}."),
    ),
    "left_right": GqaForm(
        r"Is the (\w+ \w+) left or right of the (\w+ \w+)\?",
        "relChooser",
        f"{_SECOND}->choose rel: {{0[1]}},to the left of|to the right of,s (-) [1]",
        *("hposition", ("left", "right"), "The {0} is to the {answer} of the {1}."),
    ),
    "above": GqaForm(
        r"Is the (\w+ \w+) above the (\w+ \w+)\?",
        "relVerify",
        f"{_SECOND}->verify rel: {{0[1]}},above,s (-) [1]",
    ),
    "compare": GqaForm(
        r"Are there more (\w+) than (\w+)\?",
        "compare",
        "select: {0[0]} (-)->select: {1[0]} (-)->more: ? [0,1]",
    ),
    "compare_texture": GqaForm(
        r"Do the (\w+ \w+) and the (\w+ \w+) have the same texture\?",
        "twoSame",
        f"{_FIRST}->select: {{1[1]}} (-)->filter color: {{1[0]}} [2]->same pattern: ? [1,3]",
    ),
    "logical": GqaForm(
        r"Is there a (\w+ \w+) (and|or) a (\w+ \w+) in the image\?",
        "existOr",  # existAnd for "and"
        f"{_FIRST}->exist: ? [1]->select: {{2[1]}} (-)->filter color: {{2[0]}} [3]->exist: ? [4]->{{1[0]}}:  [2,5]",
    ),
    "ground": GqaForm(
        r"What is the ground like\?",
        "place",
        "select: scene->query: ground [0]",
        *("ground", GROUNDS, "The ground is {answer}."),
    ),
}
_STEP = re.compile(r"(?P<operation>[^:]+): (?P<argument>.*?)(?: \[(?P<dependencies>[\d,]+)\])?")


def gqa_entries(scene: Scene, image_id: int, count: int) -> Iterator[tuple[str, Question, dict[str, Any]]]:
    """(id, question, GQA's record) of `count` balanced questions about a scene and of the questions derived from them."""
    balanced = {question.question: question for question in ask(scene, 3 * count) if question.structural}
    balanced = dict(list(balanced.items())[:count])
    by_words = dict(balanced)
    for question in balanced.values():
        for other in [*entailed(question), *equivalent(question)]:
            by_words.setdefault(other.question, other)
    ids = {words: f"{image_id:06d}{number:02d}" for number, words in enumerate(by_words)}
    for words, question in by_words.items():
        form, parts = _FORMS[question.question_type], _parts(question)
        follows = [ids[other.question] for other in entailed(question) if other.question in ids]
        same = [ids[other.question] for other in equivalent(question) if other.question in ids]
        full_answer = form.full_answer.format(*parts, answer=question.answer)
        entry = {
            "semantic": gqa_program(question),
            "entailed": [*same, *follows],
            "equivalent": [ids[words], *same],
            "question": words,
            "imageId": f"n{image_id}",
            "isBalanced": words in balanced,
            "groups": {
                "global": form.group,
                "local": "-".join([question.question_type, *(part.replace(" ", "_") for part in parts)]),
            },
            "answer": question.answer,
            "semanticStr": _program_text(question),
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {
                "detailed": "existAnd" if "and" in parts else form.detailed,
                "semantic": GQA_SEMANTIC[str(question.semantic)],
                "structural": question.structural,
            },
            "fullAnswer": full_answer[0].upper() + full_answer[1:],
        }
        yield ids[words], question, entry


def entailed(question: Question) -> list[Question]:
    """Questions whose answers follow from this one's: whether its objects exist, and what is true of them."""
    parts, answer = _parts(question), str(question.answer)

    def exists(words: str, truth: str = "yes", question_type: str = "exists") -> Question:
        types = QUESTION_TYPES[question_type][1:]
        return Question("", question.image_id, f"Does a {words} exist in the image?", truth, question_type, *types)

    match question.question_type, answer:
        case "texture", _:
            return [exists(parts[0]), exists(f"{answer} {parts[0]}", question_type="exists_texture")]
        case "exists_texture", "yes":
            return [exists(parts[1])]
        case "colour", _:
            return [exists(f"{answer} {parts[0]}")]
        case "shape", _:
            return [exists(f"{parts[0]} {answer}")]
        case "left_right", _:
            opposite = "right" if answer == "left" else "left"
            reverse = _like(question, f"Is the {parts[1]} left or right of the {parts[0]}?", opposite)
            return [reverse, *map(exists, parts)]
        case "above", "yes":
            return [_like(question, f"Is the {parts[1]} above the {parts[0]}?", "no"), *map(exists, parts)]
        case (("size" | "above" | "compare_texture"), _):
            return [exists(words) for words in parts]
        case "compare", "yes":
            return [_like(question, f"Are there more {parts[1]} than {parts[0]}?", "no")]
        case "logical", _ if (parts[1], answer) in (("and", "yes"), ("or", "no")):
            return [exists(parts[0], answer), exists(parts[2], answer)]
    return []


def equivalent(question: Question) -> list[Question]:
    """The same question in other words."""
    parts, answer = _parts(question), str(question.answer)
    if question.question_type == "compare_texture":
        return [_like(question, f"Do the {parts[1]} and the {parts[0]} have the same texture?", answer)]
    if question.question_type == "logical":
        return [_like(question, f"Is there a {parts[2]} {parts[1]} a {parts[0]} in the image?", answer)]
    return []


def _parts(question: Question) -> tuple[str, ...]:
    """The objects and values that a question names."""
    found = re.fullmatch(_FORMS[question.question_type].wording, question.question)
    assert found, f"{question.question_type} is not asked as {question.question!r}"
    return found.groups()


def _like(question: Question, words: str, answer: str) -> Question:
    return replace(question, id="", question=words, answer=answer)


def _program_text(question: Question) -> str:
    return _FORMS[question.question_type].program.format(*(part.split() for part in _parts(question)))


def gqa_program(question: Question) -> list[dict[str, Any]]:
    """GQA's `semantic`: [{"operation", "dependencies" (earlier steps), "argument"}]."""
    steps = []
    for text in _program_text(question).split("->"):
        found = _STEP.fullmatch(text)
        assert found, f"not a step of a program: {text!r}"
        dependencies = [int(step) for step in (found["dependencies"] or "").split(",") if step]
        steps.append({"operation": found["operation"], "dependencies": dependencies, "argument": found["argument"]})
    return steps


def gqa_look(scene: Scene, seen: dict[tuple[str, str], set[str]]) -> None:
    """Add the attributes in a scene to `seen`: (question type, object) -> values."""
    for obj in scene.objects:
        seen["texture", name(obj)].add(obj.texture)
        seen["size", name(obj)].add(obj.size)
        seen["colour", obj.shape].add(obj.colour)
        seen["shape", obj.colour].add(obj.shape)


def gqa_choices(question: Question, seen: dict[tuple[str, str], set[str]]) -> dict[str, list[str]]:
    """valid: possible answers to this type of question; plausible: those that such an object has in any scene."""
    valid = _FORMS[question.question_type].answers
    found = seen.get((question.question_type, "".join(_parts(question)[:1])), valid)
    return {"valid": list(valid), "plausible": [answer for answer in valid if answer in found]}
