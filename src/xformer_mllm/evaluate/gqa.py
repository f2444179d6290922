"""GQA: compositional questions about images, by the data set's own metrics.

Equal to GQA's eval.py (eval.zip of gqadataset.org) except for its grounding score, which needs a model's attention over a
grid. eval.py compares strings unchanged, and GQA's answers are in lower case. An answer is therefore cleaned, that is
stripped and lower-cased, also in the results file that is written, on which eval.py gives the same numbers. The group
"official, uncleaned" is eval.py's score of the answers as they are.

The group "lavis normalisation" compares as LAVIS does for BLIP-2's published number, after VQA's normalisation of both
sides (punctuation, articles, number words; `GQATask` in lavis/tasks/vqa.py).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.benchmark import ZERO_SHOT, Benchmark, Scores, field
from xformer_mllm.evaluate.vqa_accuracy import normalised
from xformer_mllm.files import read_json

STRUCTURAL = ("query", "verify", "choose", "compare", "logical")
SEMANTIC = {"attr": "attribute", "cat": "category", "global": "global", "obj": "object", "rel": "relation"}

# The fields of a question that eval.py reads, with their types.
KEYS = {
    "imageId": str,
    "question": str,
    "answer": str,
    "isBalanced": bool,
    "types": dict,
    "groups": dict,
    "semantic": list,
    "entailed": list,
}
COMMON = ("color", "material", "shape")  # attributes that two objects can share
NO_STEP = ("exist", "query: name", "choose name")  # final steps that eval.py does not count

OfficialQuestion = Mapping[str, Any]


def gqa_scores(
    questions: Mapping[str, OfficialQuestion],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Any]] | None = None,
    consistency: bool = False,
) -> Scores:
    """eval.py's scores over the balanced questions that are answered.

    Args:
        questions, choices: {question id: ...}, as in GQA's files. Validity and plausibility need choices.
        predictions: {question id: answer}.
        consistency: whether `questions` holds those that the balanced ones entail; unanswered ones do not count.

    Returns:
        "all" with accuracy, "distribution" (chi-square over 100 of predicted and true answers within GQA's global groups,
        lower is better) and the other available scores, of the cleaned answers; "official, uncleaned" with the same of
        the answers as they are; then accuracy by group, cleaned: "steps:N" is the length of the reasoning, "words:N"
        that of the question.
    """
    submitted = {name: predictions[name] for name in questions if name in predictions}
    cleaned = {name: as_written(answer) for name, answer in submitted.items()}
    balanced = {name: q for name, q in questions.items() if q["isBalanced"] and name in submitted}
    if not balanced:
        return {"all": {"n": 0}}
    as_lavis = [normalised(cleaned[name]) == normalised(question["answer"]) for name, question in balanced.items()]
    return {
        "all": _overall(questions, balanced, cleaned, choices, consistency),
        "official, uncleaned": _overall(questions, balanced, submitted, choices, consistency),
        "lavis normalisation": {"accuracy": _mean(as_lavis), "n": len(balanced)},
        **_by_group(balanced, _right(balanced, cleaned)),
    }


def as_written(answer: str) -> str:
    """An answer in GQA's spelling."""
    return answer.strip().lower()


def _right(questions: Mapping[str, OfficialQuestion], predictions: Mapping[str, str]) -> dict[str, bool]:
    return {name: predictions[name] == question["answer"] for name, question in questions.items()}


def _overall(
    questions: Mapping[str, OfficialQuestion],
    balanced: Mapping[str, OfficialQuestion],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Any]] | None,
    consistency: bool,
) -> dict[str, float]:
    """eval.py's scores over `balanced`, the answered balanced questions; strings are compared unchanged."""
    right = _right(balanced, predictions)
    overall: dict[str, float] = {"accuracy": _mean(right.values())}
    if consistency:
        overall["consistency"] = _consistency(questions, predictions, [name for name in right if right[name]])
    if choices is not None:
        for metric, kind in (("validity", "valid"), ("plausibility", "plausible")):
            overall[metric] = _mean(_belongs(predictions[n], q, choices[n][kind]) for n, q in balanced.items())
    if (distance := _distribution(balanced, predictions)) is not None:
        overall["distribution"] = distance
    return overall | {"n": len(balanced)}


def _by_group(questions: Mapping[str, OfficialQuestion], right: Mapping[str, bool]) -> Scores:
    """Accuracy by group, sorted by kind of group and then by name or number."""
    groups: dict[tuple[int, str, Any], list[bool]] = defaultdict(list)
    for name, question in questions.items():
        types = question["types"]
        for group in (
            (0, "", "open" if types["structural"] == "query" else "binary"),
            (1, "structural:", types["structural"]),
            (2, "semantic:", SEMANTIC[types["semantic"]]),
            (3, "steps:", _steps(question)),
            (4, "words:", len(question["question"].split())),
        ):
            groups[group].append(right[name])
    return {
        f"{kind}{group}": {"accuracy": _mean(found), "n": len(found)}
        for (_, kind, group), found in sorted(groups.items())
    }


def _steps(question: OfficialQuestion) -> int:
    """Number of reasoning steps, without final ones."""
    steps = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(words in step for words in NO_STEP) for step in steps)


def _consistency(
    questions: Mapping[str, OfficialQuestion], predictions: Mapping[str, str], right: Iterable[str]
) -> float:
    """Accuracy on the questions that a correctly answered one entails, averaged over the latter; 0 without any."""
    found = []
    for name in right:
        entailed = [other for other in questions[name]["entailed"] if other != name and other in predictions]
        if entailed:
            found.append(_mean(predictions[other] == questions[other]["answer"] for other in entailed))
    return _mean(found) if found else 0.0


def _belongs(answer: str, question: OfficialQuestion, choices: Iterable[str]) -> bool:
    return answer in (COMMON if "Common" in question["types"]["detailed"] else choices)


def _distribution(questions: Mapping[str, OfficialQuestion], predictions: Mapping[str, str]) -> float | None:
    """eval.py's chi-square over 100, averaged over the groups weighted by size; None if no question has a group."""
    true: dict[str, Counter] = defaultdict(Counter)
    predicted: dict[str, Counter] = defaultdict(Counter)
    for name, question in questions.items():
        group = question["groups"]["global"]
        if group is not None:
            true[group][question["answer"]] += 1
            predicted[group][predictions[name]] += 1
    distances = [
        sum((predicted[group][answer] - times) ** 2 / times for answer, times in answers.items()) * answers.total()
        for group, answers in true.items()
    ]
    return sum(distances) / sum(answers.total() for answers in true.values()) / 100 if true else None


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


class Gqa(Benchmark[Question]):
    """The balanced questions of a split; with "-all" every question, which consistency needs and takes long.

    "paper" is the BLIP-2 paper (section 4.1) with OPT. "lavis" is LAVIS's gqa_zeroshot_flant5xl_eval.yaml (FlanT5 only)
    with the length penalty of its code for OPT (`Blip2OPT.predict_answers`; FlanT5's is -1).
    """

    name = "gqa"
    splits = ("testdev", "val", "testdev-all", "val-all")
    settings = ZERO_SHOT
    result_keys = ("questionId", "prediction")
    id_type = str
    normalisation = (
        "all: cleaned (stripped and lower-cased), then GQA's exact match; "
        "official, uncleaned: GQA's exact match of the answers as submitted, as eval.py scores them; "
        "lavis normalisation: also VQA's punctuation, articles and number words, on both sides"
    )
    files = (
        "testdev_balanced_questions.json (or val_balanced_, testdev_all_, val_all_questions.json) and images/*.jpg of "
        "gqadataset.org; with val_choices.json also validity and plausibility"
    )

    def __init__(self, data: Path, split: str, images: Path | None = None):
        tier, _, everything = split.partition("-")
        self.images = images or data / "images"
        file = data / f"{tier}_{'all' if everything else 'balanced'}_questions.json"
        choices_file = data / f"{tier}_choices.json"
        self.questions = _read_questions(file)
        self.choices = _read_choices(choices_file, self.questions) if choices_file.is_file() else None
        self.consistency = bool(everything)
        self.not_computed = {}
        if not everything:
            self.not_computed["consistency"] = f"needs answers to the entailed questions: --split {tier}-all"
        if self.choices is None:
            self.not_computed |= dict.fromkeys(("validity", "plausibility"), f"there is no {choices_file}")
        self.records = [_record(name, question) for name, question in self.questions.items()]

    def image_file(self, record: Question) -> Path:
        return self.images / f"{record.image_id}.jpg"

    def score(self, answers: Mapping[str, str]) -> Scores:
        return gqa_scores(self.questions, answers, self.choices, self.consistency)

    def credit(self, record: Question, answer: str) -> float:
        return float(as_written(answer) == record.answer)

    def official(self, answers: Mapping[str, str]) -> list[dict[str, str]]:
        """Input of eval.py and the server."""
        return super().official({name: as_written(answer) for name, answer in answers.items()})


def _record(name: str, question: OfficialQuestion) -> Question:
    types = question["types"]
    structural, semantic = types["structural"], SEMANTIC[types["semantic"]]
    return Question(
        name, question["imageId"], question["question"], question["answer"], types["detailed"], structural, semantic
    )


def _read_questions(file: Path) -> dict[str, OfficialQuestion]:
    """Raises FileNotFoundError, or ValueError naming the file, the question and the key."""
    questions = read_json(file)
    if isinstance(questions, list):
        raise ValueError(
            f"{file}: a list without GQA's types, as LAVIS rewrote it; take questions1.2.zip of gqadataset.org"
        )
    if not isinstance(questions, dict) or not questions:
        raise ValueError(f"{file}: no questions; take questions1.2.zip of gqadataset.org")
    for name, question in questions.items():
        _check_question(question, f"{file}: question {name}")
    return questions


def _check_question(question: Any, where: str) -> None:
    """Raise ValueError if a question has not the fields that eval.py reads."""
    for key, kind in KEYS.items():
        field(question, key, kind, where)
    types = question["types"]
    for key, known in (("structural", STRUCTURAL), ("semantic", SEMANTIC)):
        if types.get(key) not in known:
            raise ValueError(f'{where}: "{key}" of "types" is {types.get(key)!r}, not one of {", ".join(known)}')
    field(types, "detailed", str, where)
    if "global" not in question["groups"]:
        raise ValueError(f'{where}: "global" of "groups" is missing')
    if not all(isinstance(step, dict) and {"operation", "argument"} <= set(step) for step in question["semantic"]):
        raise ValueError(f'{where}: a step of "semantic" lacks "operation" or "argument"')


def _read_choices(file: Path, questions: Mapping[str, OfficialQuestion]) -> Mapping[str, Mapping[str, Any]]:
    """Raises ValueError if a balanced question has no choices."""
    choices = read_json(file)
    for name, question in questions.items():
        found = choices.get(name) if isinstance(choices, dict) else None
        if question["isBalanced"] and not (isinstance(found, dict) and {"valid", "plausible"} <= set(found)):
            raise ValueError(
                f'{file}: question {name}: "valid" or "plausible" is missing; take eval.zip of gqadataset.org, or '
                "remove the file to skip these scores"
            )
    return choices
