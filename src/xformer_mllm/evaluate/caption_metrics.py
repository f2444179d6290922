"""Caption metrics equal to pycocoevalcap 1.2 (github.com/salaniz/pycocoevalcap), and the base of caption benchmarks.

CIDEr-D, BLEU-1 to 4 and ROUGE-L are pycocoevalcap's own code. Its PTB tokenizer, METEOR and SPICE are Java programs. They
are run here because its wrappers hang if Java hangs and download CoreNLP without asking. If a program does not run, its
metric is left out with the reason.

- Tokens: Stanford's PTB tokenizer, lower-cased, without pycocoevalcap's list of punctuation. Without Java, `plain_tokens`
  replaces it, and the name of every score says so. Over 24,019 human captions of COCO val2014 the two differed on 47, all
  with abbreviations ("Main St."), parentheses, "!!!" or "cannot". With one caption of each image scored against the
  others, CIDEr-D (0.894) changed by 0.000001, BLEU-1 by 0.00003 and BLEU-4 by 0.00001.
- The PTB tokenizer looks at the next line ("vitamin c." keeps its period unless a capital follows). As in pycocoevalcap,
  the candidates of a group follow each other, and so do its references.
- CIDEr-D: a word's weight (idf) comes from the references that are scored, so every group is scored separately, as LAVIS
  scores NoCaps' out-domain. With one image it is always 0. Scores over a part of a split are not comparable with scores
  over all of it.
- An empty caption scores 0.
"""

import itertools
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xformer_mllm.evaluate.benchmark import Benchmark, CaptionRecord, Scores
from xformer_mllm.files import read_json

PLAIN = " (plain tokenizer)"  # suffix of scores that were not computed on PTB tokens

# Time limit of a Java program. The PTB tokenizer takes one second for 24,000 captions; METEOR takes ten to start and one
# or two milliseconds per caption; SPICE parses every caption and is slower.
START_SECONDS = 180.0
SECONDS_PER_CAPTION = 0.5

NO_JAVA = "needs Java, and `java` was not found; install it, e.g. apt install default-jre-headless"
# In lower case: to the line before it, such a line is what the end of the text would be.
FIRST_LINE, LAST_LINE = "firstline", "lastline"
CORENLP_HOME = "CORENLP_HOME"  # environment variable of CoreNLP's folder, as in Stanford's own tools
CORENLP_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
PARTIAL = (
    "not all images have a caption: CIDEr-D weights words by the references that are scored, so it is not comparable with "
    "CIDEr-D over all images"
)
SHOWN_CHARACTERS = 200  # of the output of a failed Java program


Tokens = Mapping[str, Mapping[str, tuple[str, ...]]]
"""{group: {image: (candidate, reference, ...)}}, tokens separated by spaces."""


class NotComputedError(Exception):
    """A metric cannot be computed here; the message says why."""


@dataclass(frozen=True)
class CaptionScores:
    """scores: {group: {metric: value}}; not_computed: {metric: why it was not computed}."""

    scores: Scores
    not_computed: Mapping[str, str]


def score_captions(
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, str],
    groups: Mapping[str, Iterable[str]] | None = None,
) -> CaptionScores:
    """Score one caption per image against its references.

    Args:
        references: {image: its captions, one or more}.
        candidates: {image: the caption to score}; images without one are not scored.
        groups: {name: images}, each scored separately; by default {"all": every image}. Groups without a candidate are
            left out.

    Returns:
        For each group CIDEr-D, BLEU-1 to 4, ROUGE-L, METEOR, SPICE and n, on pycocoevalcap's scales (CIDEr-D in [0, 10],
        the others in [0, 1]); {"all": {"n": 0}} without any candidate.
    """
    members = {
        name: kept
        for name, images in (groups or {"all": references}).items()
        if (kept := [image for image in images if image in candidates])
    }
    if not members:
        return CaptionScores({"all": {"n": 0}}, {})
    tokens, reason = _tokenised(members, candidates, references)
    suffix = PLAIN if reason else ""
    scores: Scores = {}
    for name, group in tokens.items():
        scores[name] = {metric + suffix: value for metric, value in _overlap_scores(group).items()}
    not_computed = dict.fromkeys(("PTB tokenizer", "METEOR", "SPICE"), reason) if reason else {}
    for metric, compute in () if reason else (("METEOR", _meteor), ("SPICE", _spice)):
        try:
            for name, value in compute(tokens).items():
                scores[name][metric] = value
        except NotComputedError as error:
            not_computed[metric] = str(error)
    for name, images in members.items():
        scores[name]["n"] = len(images)
    return CaptionScores(scores, not_computed)


def _overlap_scores(tokens: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Compute the metrics of a group that need no Java."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references = {image: list(texts[1:]) for image, texts in tokens.items()}
    candidates = {image: [texts[0]] for image, texts in tokens.items()}
    cider, _ = Cider().compute_score(references, candidates)
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    rouge, _ = Rouge().compute_score(references, candidates)
    by_length = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    return {name: float(value) for name, value in {"CIDEr-D": cider, **by_length, "ROUGE-L": rouge}.items()}


# -------------------------------------------------------------------------------------------------------------- tokens


def _tokenised(
    groups: Mapping[str, Sequence[str]], candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[Tokens, str | None]:
    """Tokenise the captions of the groups; also return why the tokens are not PTB's, or None if they are."""
    flat: list[str] = []
    for images in groups.values():
        flat += [*(candidates[image] for image in images), LAST_LINE]
        flat += [*itertools.chain.from_iterable(references[image] for image in images), LAST_LINE]
    try:
        tokens, reason = ptb_tokens(flat), None
    except NotComputedError as error:
        tokens, reason = [plain_tokens(caption) for caption in flat], str(error)
    rest = iter(tokens)
    found = {}
    for name, images in groups.items():
        first = list(itertools.islice(rest, len(images) + 1))[:-1]
        others = [tuple(itertools.islice(rest, len(references[image]))) for image in images]
        next(rest)  # LAST_LINE
        found[name] = {image: (one, *more) for image, one, more in zip(images, first, others, strict=True)}
    return found, reason


def ptb_tokens(captions: Sequence[str]) -> list[str]:
    """Stanford's PTB tokens of each caption, lower-cased, without punctuation, separated by spaces.

    The tokens can depend on the caption that follows.
    Equal to pycocoevalcap's PTBTokenizer, except that all line breaks within a caption become spaces: PTBTokenizer splits
    captions at some of them. Raises NotComputedError if Java does not run.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    main = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    # Java may print warnings first, and stop before the last line.
    text = "\n".join([FIRST_LINE, *(" ".join(caption.splitlines()) for caption in captions), LAST_LINE])
    printed = _run_java(
        ["-cp", STANFORD_CORENLP_3_4_1_JAR, *main], _package() / "tokenizer", text, _time_limit(len(captions))
    )
    lines = printed.partition(f"{FIRST_LINE}\n")[2].rpartition(LAST_LINE)[0].split("\n")[:-1]
    if len(lines) != len(captions):
        raise NotComputedError(f"Java's PTB tokenizer printed {len(lines)} lines, not {len(captions)}")
    return [" ".join(token for token in line.split(" ") if token and token not in PUNCTUATIONS) for line in lines]


# n't and other contractions, a word (with hyphens, slashes and points inside), or a character that PTB's list keeps.
_PLAIN_TOKEN = re.compile(
    r"n't\b|'(?:s|re|ve|ll|m|d)\b|(?:(?!n't\b)\w)+(?:[-/.](?:(?!n't\b)\w)+)*|[^\s\w.,?!:;\"`'()-]"
)


def plain_tokens(caption: str) -> str:
    """Approximate `ptb_tokens` without Java: lower-cased, contractions split, no punctuation."""
    return " ".join(_PLAIN_TOKEN.findall(caption.lower()))


# ---------------------------------------------------------------------------------------------------------------- Java


def _distinct(tokens: Tokens) -> list[tuple[str, ...]]:
    """The (candidate, reference, ...) of all groups, without repetitions: groups share images."""
    return list(dict.fromkeys(texts for group in tokens.values() for texts in group.values()))


def _meteor(tokens: Tokens) -> dict[str, float]:
    """Compute METEOR 1.5 of each group. Raises NotComputedError."""
    command = ["java", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    seconds = _time_limit(sum(map(len, _distinct(tokens))))
    end = time.monotonic() + seconds
    with tempfile.TemporaryFile() as errors:  # an unread pipe would fill up and block Java
        try:
            with subprocess.Popen(
                command, cwd=_package() / "meteor", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            ) as java:
                watchdog = threading.Timer(seconds, java.kill)
                watchdog.start()
                try:
                    return _ask_meteor(java, tokens)
                finally:
                    watchdog.cancel()
                    java.kill()
        except FileNotFoundError:
            raise NotComputedError(NO_JAVA) from None
        except (OSError, ValueError) as error:  # Java ended, or printed no numbers
            if time.monotonic() >= end:
                raise NotComputedError(_too_slow(seconds)) from None
            errors.seek(0)
            raise NotComputedError(f"METEOR failed ({_one_line(errors.read()) or error})") from None


def _ask_meteor(java: subprocess.Popen, tokens: Tokens) -> dict[str, float]:
    """Run METEOR's protocol, one line per answer. Raises OSError or ValueError for an answer that is not a number."""
    to_java, from_java = java.stdin, java.stdout
    assert to_java is not None
    assert from_java is not None
    # Java may print warnings first.
    answers = itertools.dropwhile(lambda line: not line[:1].isdigit(), iter(from_java.readline, b""))

    def read() -> str:
        answer = next(answers, b"Java ended").decode("utf-8", "replace").strip()
        if not answer[:1].isdigit():
            raise ValueError(answer)
        return answer

    def ask(*parts: str) -> str:
        line = " ||| ".join(part.replace("|||", "") for part in parts)  # a caption must not hold the separator
        to_java.write(_bytes(line + "\n"))
        to_java.flush()
        return read()

    compared = {}
    for texts in _distinct(tokens):
        candidate, *references = texts
        compared[texts] = ask("SCORE", *references, candidate)
    scores = {}
    for name, group in tokens.items():
        # Answered with the score of each image, then of the group.
        ask("EVAL", *(compared[texts] for texts in group.values()))
        scores[name] = [float(read()) for _ in group][-1]
    return scores


def _spice(tokens: Tokens) -> dict[str, float]:
    """Compute SPICE 1.0 of each group, the mean F over its images. Raises NotComputedError.

    pycocoevalcap's cache of parses is not used: it would grow in the installed package.
    """
    folder = _package() / "spice"
    # The manifest of spice-1.0.jar names its other libraries.
    classes = os.pathsep.join(map(str, ("spice-1.0.jar", *_corenlp(folder / "lib"))))
    distinct = _distinct(tokens)
    rows = [
        {"image_id": index, "test": candidate, "refs": references}
        for index, (candidate, *references) in enumerate(distinct)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        input_file, output_file = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
        input_file.write_text(json.dumps(rows), encoding="utf-8")
        arguments = ["-Xmx8G", "-cp", classes, "edu.anu.spice.SpiceScorer"]
        arguments += [str(input_file), "-out", str(output_file), "-silent"]
        _run_java(arguments, folder, "", _time_limit(sum(map(len, distinct))))
        try:
            found = {distinct[row["image_id"]]: float(row["scores"]["All"]["f"]) for row in read_json(output_file)}
            return {name: sum(found[texts] for texts in group.values()) / len(group) for name, group in tokens.items()}
        except (OSError, ValueError, LookupError, TypeError):
            raise NotComputedError("SPICE ended without scores") from None


def _corenlp(package: Path) -> list[Path]:
    """CoreNLP's jars, in the folder that CORENLP_HOME names or else in pycocoevalcap's. Raises NotComputedError."""
    home = os.environ.get(CORENLP_HOME)
    for folder in (*([Path(home).expanduser().resolve()] if home else []), package):
        jars = [folder / jar for jar in CORENLP_JARS]
        if all(jar.is_file() for jar in jars):
            return jars
    where = f"{CORENLP_HOME}={home} lacks {' or '.join(CORENLP_JARS)}" if home else "which was not found"
    raise NotComputedError(
        f"needs Stanford CoreNLP 3.6.0, {where}; set {CORENLP_HOME} to its unpacked folder, or "
        "python -m pycocoevalcap.spice.get_stanford_models fetches it once (about 500 MB)"
    )


def _package() -> Path:
    """The folder of pycocoevalcap, which holds the Java programs."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    return Path(ptbtokenizer.__file__).parents[1]


def _time_limit(captions: int) -> float:
    return START_SECONDS + SECONDS_PER_CAPTION * captions


def _run_java(arguments: Sequence[str], folder: Path, text: str, seconds: float) -> str:
    """Run Java on `text` and return its output. Raises NotComputedError without Java, on failure and on timeout."""
    try:
        done = subprocess.run(
            ["java", *arguments], cwd=folder, input=_bytes(text), capture_output=True, timeout=seconds
        )
    except FileNotFoundError:
        raise NotComputedError(NO_JAVA) from None
    except subprocess.TimeoutExpired:
        raise NotComputedError(_too_slow(seconds)) from None
    except OSError as error:
        raise NotComputedError(f"needs Java, and `java` cannot be run ({error.strerror})") from None
    if done.returncode:
        raise NotComputedError(f"Java failed (exit code {done.returncode}: {_one_line(done.stderr or done.stdout)})")
    return done.stdout.decode("utf-8", "replace")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # JSON may hold half a surrogate pair


def _too_slow(seconds: float) -> str:
    return f"Java did not finish within {seconds:.0f} s"


def _one_line(printed: bytes) -> str:
    lines = [line.strip() for line in printed.decode("utf-8", "replace").splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("Picked up"))[:SHOWN_CHARACTERS]


# ---------------------------------------------------------------------------------------------------------- benchmarks


class CaptionBenchmark(Benchmark[CaptionRecord]):
    """Images with reference captions; the official results are COCO's, [{"image_id": 42, "caption": "..."}].

    A subclass sets `records`, whose ids are integers as text, and by record id `references` and `paths` of the images;
    `groups` is {name: record ids}.
    """

    normalisation = (
        "PTB tokens, lower-cased, without punctuation; without Java those of a plain tokenizer, which the names of the "
        "scores state"
    )
    result_keys = ("image_id", "caption")
    references: Mapping[str, Sequence[str]]
    groups: Mapping[str, Sequence[str]]
    paths: Mapping[str, Path]

    def image_file(self, record: CaptionRecord) -> Path:
        return self.paths[record.id]

    def truth(self, record: CaptionRecord) -> str:
        """The first reference."""
        return next(iter(self.references.get(record.id, ())), "")

    def score(self, answers: Mapping[str, str]) -> Scores:
        found = score_captions(self.references, answers, self.groups)
        self.not_computed = found.not_computed
        self.notes = [PARTIAL] if len(answers) < len(self.records) else []
        return found.scores
