"""The official accuracy of VQA: min(1, agreeing annotators / 3), averaged over all choices of nine of the ten annotators.

Equal to `vqaEval.py` of GT-Vision-Lab/VQA (PythonEvaluationTools, commit a013f00), including its bugs, which all published
numbers share:

- if all annotators gave the same answer, nothing is normalised: "Yes" is wrong if all ten wrote "yes";
- the regular expression for periods has a lookahead for "<" in place of a lookbehind for a digit, so it removes every
  period without a digit after it ("3." -> "3"); re.UNICODE (32) is passed as the count, so it removes at most 32;
- one digit,digit anywhere deletes all punctuation, which otherwise becomes a space unless it is next to a space.

LAVIS reports BLIP-2's numbers with a changed copy (lavis/common/vqa_tools/vqa_eval.py at 506965b). It always normalises
the prediction, but only the punctuation of the annotators' answers. So it differs where all annotators agree, and where
one of them wrote a number word, an article or a capital.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"[0-9],[0-9]")  # not \d: upstream runs under Python 2, whose \d is ASCII
PERIOD = re.compile(r"\.(?![0-9])")
MOST_PERIODS = 32

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}

# Contractions, matched with any one apostrophe left out. Upstream's table also has Im, Ive and I'd've, which never
# match, as words are looked up in lower case ("im" stays as it is), and lacks others ("couldntve").
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


# As written -> as compared.
CONTRACTIONS = {
    **{written: word for word in _CONTRACTIONS.split() for written in _without_one_apostrophe(word)},
    "somebody'd": "somebodyd",  # upstream's entry is the wrong way round
}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of a prediction in [0, 1]: the mean over the annotators of min(1, others who gave this answer / 3).

    answers: one per annotator, ten in VQAv2. Upstream prints 100 times the mean over the questions, with two decimals.
    """
    prediction, answers = _on_one_line(prediction), [_on_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalised(prediction), [normalised(answer) for answer in answers]
    agreeing = answers.count(prediction)
    return sum(min(1.0, (agreeing - (answer == prediction)) / 3) for answer in answers) / len(answers)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=100_000)  # few distinct answers
def normalised(text: str) -> str:
    """Normalise punctuation, case, number words, articles and contractions, in this order."""
    words = [NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    delete = DIGIT_COMMA_DIGIT.search(text) is not None
    marks = {
        ord(mark): "" if delete or f"{mark} " in text or f" {mark}" in text else " "
        for mark in PUNCTUATION
        if mark in text
    }
    return PERIOD.sub("", text.translate(marks), count=MOST_PERIODS)
