"""What `xformer data export gqa` says about the scenes' questions: GQA's records with their programs, the questions that
they entail or are equivalent to, and the choices of answers. The files are written in `exports.py`.

Format: GQA's own eval.py.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.scene_questions import QUESTION_TYPES, ask, name
from xformer_mllm.embedded.world import COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES, Scene

GQA_SEMANTIC = {"object": "obj", "attribute": "attr", "category": "cat", "relation": "rel", "global": "global"}

# What a type of question is about: GQA's global group, whose answers the distribution score counts. Yes/no: none.
GQA_GROUPS = {
    "texture": "texture",
    "colour": "color",
    "shape": "shape",
    "size": "size",
    "left_right": "hposition",
    "ground": "ground",
}
GQA_DETAILED = {
    "exists": "exist",
    "exists_texture": "existAttr",
    "texture": "directOf",
    "colour": "directOf",
    "shape": "categoryAttr",
    "size": "chooseAttr",
    "left_right": "relChooser",
    "above": "relVerify",
    "compare": "compare",
    "compare_texture": "twoSame",
    "logical": "existOr",
    "ground": "place",
}
VALID_ANSWERS = {
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "left_right": ("left", "right"),
    "ground": GROUNDS,
}
YES_NO = ("yes", "no")

# The words of scene_questions.py, to be read again: type of question -> its things and values.
_FORMS = {
    "exists": r"Does a (\w+ \w+) exist in the image\?",
    "exists_texture": r"Does a (\w+) (\w+ \w+) exist in the image\?",
    "texture": r"What texture does the (\w+ \w+) have\?",
    "colour": r"What colour is the (\w+)\?",
    "shape": r"What shape is the (\w+) object\?",
    "size": r"Is the (\w+ \w+) small or large\?",
    "left_right": r"Is the (\w+ \w+) left or right of the (\w+ \w+)\?",
    "above": r"Is the (\w+ \w+) above the (\w+ \w+)\?",
    "compare": r"Are there more (\w+) than (\w+)\?",
    "compare_texture": r"Do the (\w+ \w+) and the (\w+ \w+) have the same texture\?",
    "logical": r"Is there a (\w+ \w+) (and|or) a (\w+ \w+) in the image\?",
    "ground": r"What is the ground like\?",
}


def gqa_entries(scene: Scene, image_id: int, count: int) -> Iterator[tuple[str, Question, dict[str, Any]]]:
    """(id, question, GQA's record) of `count` questions of a scene, which are balanced, and of what follows from them."""
    asked = [question for question in ask(scene, 3 * count) if question.structural]
    asked = asked[:count]
    balanced = {question.question for question in asked}
    by_words = {question.question: question for question in asked}
    for question in asked:
        for other in [*entailed(question), *equivalent(question)]:
            by_words.setdefault(other.question, other)
    ids = {words: f"{image_id:06d}{number:02d}" for number, words in enumerate(by_words)}
    for words, question in by_words.items():
        follows = [ids[other.question] for other in entailed(question) if other.question in ids]
        same = [ids[other.question] for other in equivalent(question) if other.question in ids]
        program = gqa_program(question)
        entry = {
            "semantic": program,
            "entailed": [*same, *follows],
            "equivalent": [ids[words], *same],
            "question": words,
            "imageId": f"n{image_id}",
            "isBalanced": words in balanced,
            "groups": {"global": GQA_GROUPS.get(question.question_type), "local": _local_group(question)},
            "answer": question.answer,
            "semanticStr": "->".join(map(_step_text, program)),
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {
                "detailed": _detailed(question),
                "semantic": GQA_SEMANTIC[str(question.semantic)],
                "structural": question.structural,
            },
            "fullAnswer": _full_answer(question),
        }
        yield ids[words], question, entry


def entailed(question: Question) -> list[Question]:
    """What follows from a question and its answer for sure: that its things exist, and what is true of them."""
    parts, answer = _parts(question), str(question.answer)
    if question.question_type == "texture":
        return [_exists(question, parts[0]), _exists_texture(question, answer, parts[0])]
    if question.question_type == "exists_texture" and answer == "yes":
        return [_exists(question, parts[1])]
    if question.question_type == "colour":
        return [_exists(question, f"{answer} {parts[0]}")]
    if question.question_type == "shape":
        return [_exists(question, f"{parts[0]} {answer}")]
    if question.question_type == "size":
        return [_exists(question, parts[0])]
    if question.question_type == "left_right":
        turned = _like(
            question, f"Is the {parts[1]} left or right of the {parts[0]}?", _other(("left", "right"), answer)
        )
        return [turned, _exists(question, parts[0]), _exists(question, parts[1])]
    if question.question_type in ("above", "compare_texture"):
        is_above = question.question_type == "above" and answer == "yes"
        below = [_like(question, f"Is the {parts[1]} above the {parts[0]}?", "no")] if is_above else []
        return below + [_exists(question, thing) for thing in parts]
    if question.question_type == "compare" and answer == "yes":
        return [_like(question, f"Are there more {parts[1]} than {parts[0]}?", "no")]
    if question.question_type == "logical" and (parts[1], answer) in (("and", "yes"), ("or", "no")):
        return [_exists(question, thing, answer) for thing in (parts[0], parts[2])]
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
    """The things and values that a question names."""
    found = re.fullmatch(_FORMS[question.question_type], question.question)
    assert found, f"{question.question_type} is not asked as {question.question!r}"
    return found.groups()


def _like(question: Question, words: str, answer: str) -> Question:
    return replace(question, id="", question=words, answer=answer)


def _of_type(question: Question, question_type: str, words: str, answer: str) -> Question:
    _, structural, semantic = QUESTION_TYPES[question_type]
    return Question("", question.image_id, words, answer, question_type, structural, semantic)


def _exists(question: Question, thing: str, answer: str = "yes") -> Question:
    return _of_type(question, "exists", f"Does a {thing} exist in the image?", answer)


def _exists_texture(question: Question, texture: str, thing: str) -> Question:
    return _of_type(question, "exists_texture", f"Does a {texture} {thing} exist in the image?", "yes")


def _other(pair: tuple[str, str], word: str) -> str:
    return pair[1 - pair.index(word)]


class _Program:
    """A question's functional program, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def add(self, operation: str, argument: str, *dependencies: int) -> int:
        self.steps.append({"operation": operation, "dependencies": list(dependencies), "argument": argument})
        return len(self.steps) - 1

    def thing(self, words: str) -> int:
        """Select "red circle": the shape, then its colour. GQA writes an object's id in brackets, "-" if unknown."""
        colour, shape = words.split()
        return self.add("filter color", colour, self.add("select", f"{shape} (-)"))


def gqa_program(question: Question) -> list[dict[str, Any]]:
    """GQA's `semantic`: [{"operation", "dependencies" (earlier steps), "argument"}]."""
    kind, parts, program = question.question_type, _parts(question), _Program()
    if kind == "exists":
        program.add("exist", "?", program.thing(parts[0]))
    elif kind == "exists_texture":
        program.add("exist", "?", program.add("filter pattern", parts[0], program.thing(parts[1])))
    elif kind == "texture":
        program.add("query", "pattern", program.thing(parts[0]))
    elif kind == "colour":
        program.add("query", "color", program.add("select", f"{parts[0]} (-)"))
    elif kind == "shape":
        program.add("query", "name", program.add("filter color", parts[0], program.add("select", "object (-)")))
    elif kind == "size":
        program.add("choose size", "|".join(SIZES), program.thing(parts[0]))
    elif kind == "left_right":
        subject = parts[0].split()[1]
        program.add("choose rel", f"{subject},to the left of|to the right of,s (-)", program.thing(parts[1]))
    elif kind == "above":
        program.add("verify rel", f"{parts[0].split()[1]},above,s (-)", program.thing(parts[1]))
    elif kind == "compare":
        program.add("more", "?", *(program.add("select", f"{plural} (-)") for plural in parts))
    elif kind == "compare_texture":
        program.add("same pattern", "?", *[program.thing(thing) for thing in parts])
    elif kind == "logical":
        things = [program.add("exist", "?", program.thing(thing)) for thing in (parts[0], parts[2])]
        program.add(parts[1], "", *things)
    else:
        program.add("query", "ground", program.add("select", "scene"))
    return program.steps


def _step_text(step: dict[str, Any]) -> str:
    """ "filter color: red [0]", as in GQA's semanticStr."""
    needs = f" [{','.join(map(str, step['dependencies']))}]" if step["dependencies"] else ""
    return f"{step['operation']}: {step['argument']}{needs}"


def _detailed(question: Question) -> str:
    if question.question_type == "logical" and _parts(question)[1] == "and":
        return "existAnd"
    return GQA_DETAILED[question.question_type]


def _local_group(question: Question) -> str:
    """GQA's local group: questions about the same thing, of the same kind."""
    return "-".join([question.question_type, *(part.replace(" ", "_") for part in _parts(question))])


def _full_answer(question: Question) -> str:
    """A sentence: "Yes." and "No.", or what the one-word answer says of the thing."""
    parts, answer = _parts(question), str(question.answer)
    sentences = {
        "texture": "The {0} is {answer}.",
        "colour": "The {0} is {answer}.",
        "shape": "The {0} object is a {answer}.",
        "size": "The {0} is {answer}.",
        "left_right": "The {0} is to the {answer} of the {1}.",
        "ground": "The ground is {answer}.",
    }
    if question.question_type not in sentences:
        return f"{answer.capitalize()}."
    return sentences[question.question_type].format(*parts, answer=answer)


def gqa_look(scene: Scene, seen: dict[tuple[str, str], set[str]]) -> None:
    """Note what the scene shows: `seen` holds the values of (kind of question, thing)."""
    for thing in scene.objects:
        seen["texture", name(thing)].add(thing.texture)
        seen["size", name(thing)].add(thing.size)
        seen["colour", thing.shape].add(thing.colour)
        seen["shape", thing.colour].add(thing.shape)


def gqa_choices(question: Question, seen: dict[tuple[str, str], set[str]]) -> dict[str, list[str]]:
    """valid: what can be an answer to such a question; plausible: what was seen of such a thing in any of the scenes."""
    valid = VALID_ANSWERS.get(question.question_type, YES_NO)
    found = seen.get((question.question_type, "".join(_parts(question)[:1])), valid)
    return {"valid": list(valid), "plausible": [answer for answer in valid if answer in found]}
