"""Caption scores against what pycocoevalcap gave (fixtures/caption_metrics.json says how), and a Java that misbehaves."""

import json
import os
import time
from pathlib import Path

import pytest

from xformer_mllm.evaluate import caption_metrics
from xformer_mllm.evaluate.caption_metrics import NotComputedError, plain_tokens, ptb_tokens, score_captions

OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "caption_metrics.json").read_text(encoding="utf-8"))
OFFICIAL_NAMES = {
    "CIDEr-D": "CIDEr",
    **{f"BLEU-{n}": f"Bleu_{n}" for n in range(1, 5)},
    "ROUGE-L": "ROUGE_L",
    "METEOR": "METEOR",
}
OVERLAP = [name for name in OFFICIAL_NAMES if name != "METEOR"]
HANGS, ENDLESS = "exec sleep 60", "while :; do echo warning; sleep 0.1; done"
ONE = ({"1": ["a dog on a bench"]}, {"1": "a dog"})


def recorded(kind):
    """References, candidates and groups of the fixture."""
    captions = OFFICIAL[kind]["captions"]
    references = {name: entry["references"] for name, entry in captions.items()}
    candidates = {name: entry["candidate"] for name, entry in captions.items()}
    return references, candidates, OFFICIAL[kind]["groups"]


@pytest.fixture(scope="module")
def java():
    """Skips where Java does not run."""
    try:
        ptb_tokens(["a"])
    except NotComputedError as error:
        pytest.skip(str(error))


@pytest.fixture
def no_meteor(monkeypatch):
    """METEOR takes ten seconds to read its paraphrases."""

    def refuse(*_):
        raise NotComputedError("left out")

    monkeypatch.setattr(caption_metrics, "_meteor", refuse)


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """fake_java(script) puts a shell script in Java's place. One that hangs is given a second."""
    monkeypatch.setattr(caption_metrics, "SECONDS_PER_CAPTION", 0.0)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def write(script):
        if HANGS in script or ENDLESS in script:
            monkeypatch.setattr(caption_metrics, "START_SECONDS", 1.0)
        file = folder / "java"
        file.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{script}\n")
        file.chmod(0o755)

    return write


def gone(tmp_path):
    """Whether the last fake Java has ended."""
    try:
        os.kill(int((tmp_path / "pid").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


# -------------------------------------------------------------------------------------------- against the official ones


def test_all_scores_equal_the_official_ones(java):
    """Contractions, brackets, abbreviations, accents, empty candidates, the last one empty; groups; METEOR too."""
    references, candidates, groups = recorded("rich")
    assert sum(not caption for caption in candidates.values()) == 3
    found = score_captions(references, candidates, groups)
    assert list(found.scores) == list(groups)
    for group, official in OFFICIAL["rich"]["scores"].items():
        scores = found.scores[group]
        assert scores.pop("n") == len(groups[group])
        scores.pop("SPICE", None)  # the fixture was made without it
        assert scores == pytest.approx({name: official[theirs] for name, theirs in OFFICIAL_NAMES.items()}, abs=1e-12)
    assert set(found.not_computed) <= {"SPICE"}


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_ptb_tokens_equal_the_official_ones(java, kind):
    tokens = OFFICIAL[kind]["tokens"]
    assert dict(zip(tokens, ptb_tokens(list(tokens)), strict=True)) == tokens


def test_without_java_plain_captions_score_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    references, candidates, groups = recorded("plain")
    found = score_captions(references, candidates, groups)
    for group, official in OFFICIAL["plain"]["scores"].items():
        expected = {f"{name} (plain tokenizer)": official[OFFICIAL_NAMES[name]] for name in OVERLAP}
        assert found.scores[group] == pytest.approx(expected | {"n": len(groups[group])}, abs=1e-12)
    assert list(found.not_computed) == ["PTB tokenizer", "METEOR", "SPICE"]
    assert all("apt install default-jre" in reason for reason in found.not_computed.values())


def test_plain_tokens_are_the_ptb_ones_on_plain_captions():
    tokens = OFFICIAL["plain"]["tokens"]
    assert {caption: plain_tokens(caption) for caption in tokens} == tokens
    assert {caption: plain_tokens(caption) for caption in OFFICIAL["rich"]["tokens"]} != OFFICIAL["rich"]["tokens"]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's t-shirt, red.", "a man 's t-shirt red"),
        ("They don't move; I can't.", "they do n't move i ca n't"),
        ("A tub/shower & a 2.5 m sink -- well", "a tub/shower & a 2.5 m sink well"),
        ("It's a café", "it 's a café"),
        ("...", ""),
    ],
)
def test_plain_tokens_of_contractions_and_signs(caption, tokens):
    assert plain_tokens(caption) == tokens


def test_ptb_tokens_of_the_same(java):
    captions = ["They don't move; I can't.", "A tub/shower & a 2.5 m sink -- well"]
    assert ptb_tokens(captions) == ["they do n't move i ca n't", "a tub/shower & a 2.5 m sink well"]


# What PTBTokenizer gave for the references and for the candidates of the images in order, and Meteor for these tokens.
NEXT_LINE = {
    "references": {"1": ["the cat"], "2": ["A plate of vitamin c.", "The letter j."], "3": ["a dog"], "4": ["No z."]},
    "candidates": {"1": "a cat at plan z.", "2": "The letter c.", "3": "A dog", "4": "the z."},
    "tokens": {
        "1": ("a cat at plan z", "the cat"),
        "2": ("the letter c", "a plate of vitamin c", "the letter j."),
        "3": ("a dog", "a dog"),
        "4": ("the z.", "no z."),
    },
}


def test_the_line_that_follows_a_caption_is_the_official_ones(java, monkeypatch):
    """The tokenizer keeps the period of "c." unless the next line starts with a capital: in a group, the next image's."""
    seen = {}

    def record(tokens):
        seen.update(tokens)
        raise NotComputedError("recorded")

    monkeypatch.setattr(caption_metrics, "_meteor", record)
    groups = {"all": list("1234"), "without 2": list("134"), "first": ["1"]}
    score_captions(NEXT_LINE["references"], NEXT_LINE["candidates"], groups)
    assert seen["all"] == NEXT_LINE["tokens"]
    assert seen["without 2"] == {name: NEXT_LINE["tokens"][name] for name in "134"}
    assert seen["first"] == {"1": ("a cat at plan z.", "the cat")}


# ------------------------------------------------------------------------------------------------------------ odd input


def test_captions_with_line_breaks_stay_one_caption(java):
    odd = ["a\nb", "a\r\nb", "a\u2028b", "a\x0bb\x0cc", "", "a ||| b", "a \ud800 b", " "]
    tokens = ptb_tokens([*odd, "the end"])
    assert len(tokens) == len(odd) + 1
    assert [tokens[0], tokens[2], tokens[3], tokens[4], tokens[-1]] == ["a b", "a b", "a b c", "", "the end"]


def test_empty_captions_score_nothing(java, no_meteor):
    references = {"1": ["a dog on a bench"], "2": ["a cat", "the cat"]}
    scores = score_captions(references, {"1": "", "2": ""}).scores["all"]
    assert scores.pop("n") == 2
    assert scores == pytest.approx(dict.fromkeys(OVERLAP, 0.0), abs=1e-9)


def test_cider_of_a_group_is_weighed_by_its_own_references(no_meteor, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    references = {str(n): [f"a dog number {word}"] for n, word in enumerate(("one", "two", "three", "four"))}
    candidates = {name: captions[0] for name, captions in references.items()}
    scores = score_captions(references, candidates, {"all": list(references), "one": ["0"], "none": ["9"]}).scores
    assert list(scores) == ["all", "one"]
    assert scores["all"]["CIDEr-D (plain tokenizer)"] > 5
    assert scores["one"]["CIDEr-D (plain tokenizer)"] == 0, "with one image no word is rarer than another"


def test_only_what_has_a_candidate_is_scored(no_meteor):
    references = {"1": ["a dog"], "2": ["a cat"]}
    assert score_captions(references, {"2": "a cat"}).scores["all"]["n"] == 1
    assert score_captions(references, {}).scores == {"all": {"n": 0}}


# ------------------------------------------------------------------------------------------------- a Java that misbehaves


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo Picked up X >&2; echo Error: no VM >&2; echo too small >&2; exit 1",
            "exit code 1: Error: no VM too small",
        ),
        (HANGS, "did not finish within 1 s"),
        ("cat > /dev/null; echo firstline; echo a", "0 lines, not 4"),
        ("exit 0", "0 lines, not 4"),
        ("cat | head -n 2", "0 lines, not 4"),
    ],
)
def test_a_failing_java_gives_the_plain_tokenizer(fake_java, tmp_path, script, reason):
    fake_java(script)
    start = time.monotonic()
    found = score_captions(*ONE)
    assert time.monotonic() - start < 20
    assert "CIDEr-D (plain tokenizer)" in found.scores["all"]
    assert not {"METEOR", "SPICE"} & set(found.scores["all"])
    assert reason in found.not_computed["PTB tokenizer"]
    assert len(found.not_computed["METEOR"].splitlines()) == 1
    assert gone(tmp_path)


def test_a_java_that_is_no_program(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("no program at all")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "cannot be run" in score_captions(*ONE).not_computed["METEOR"]


# What a METEOR does with one image: a line for its comparison, and to EVAL two, of the image and of all.
METEOR = """
while read -r line; do
  case "$line" in
    SCORE*) echo "1.0 2.0";;
    EVAL*) echo 0.5; echo 0.25;;
  esac
done
"""


def with_tokenizer(meteor):
    return f'case "$*" in *PTBTokenizer*) exec cat;; *meteor*) {meteor};; esac'


@pytest.mark.parametrize(
    "script", [METEOR, f"echo '[0.01s][warning] memory'{METEOR}", f"head -c 300000 /dev/zero >&2{METEOR}"]
)
def test_warnings_of_java_do_no_harm(fake_java, tmp_path, script):
    fake_java(f"echo '[0.01s][warning] memory'; {with_tokenizer(script)}")
    found = score_captions(*ONE)
    assert found.scores["all"]["METEOR"] == 0.25
    assert "CIDEr-D" in found.scores["all"]
    assert gone(tmp_path)


@pytest.mark.parametrize(
    ("meteor", "reason"),
    [
        ("echo java.lang.OutOfMemoryError >&2; exit 3", "METEOR failed (java.lang.OutOfMemoryError)"),
        ("exit 0", "METEOR failed ("),
        ("read -r line; echo 1.0 2.0; exit 0", "METEOR failed ("),
        ("read -r line; echo 1.0 2.0; echo Error: specify; exec cat", "METEOR failed (Error: specify)"),
        (HANGS, "did not finish within 1 s"),
        (ENDLESS, "did not finish within 1 s"),
    ],
)
def test_a_meteor_that_fails_leaves_the_others(fake_java, tmp_path, meteor, reason):
    fake_java(with_tokenizer(meteor))
    start = time.monotonic()
    found = score_captions(*ONE)
    assert time.monotonic() - start < 20
    assert reason in found.not_computed["METEOR"]
    assert len(found.not_computed["METEOR"].splitlines()) == 1
    assert set(found.scores["all"]) == {*OVERLAP, "n"}
    assert gone(tmp_path)


# --------------------------------------------------------------------------------------------------------------- SPICE


def test_spice_is_never_downloaded(java, no_meteor, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr("urllib.request.urlretrieve", refuse)
    monkeypatch.setattr(caption_metrics, "CORENLP_JARS", ("stanford-corenlp-9.9.9.jar",))
    monkeypatch.delenv("CORENLP_HOME", raising=False)
    found = score_captions(*ONE)
    assert "SPICE" not in found.scores["all"]
    assert "python -m pycocoevalcap.spice.get_stanford_models" in found.not_computed["SPICE"]


@pytest.fixture
def with_corenlp(tmp_path, monkeypatch):
    """A pycocoevalcap folder that looks as if CoreNLP were there."""
    for name in ("tokenizer", "meteor", "spice/lib"):
        (tmp_path / "package" / name).mkdir(parents=True)
    for jar in caption_metrics.CORENLP_JARS:
        (tmp_path / "package" / "spice" / "lib" / jar).touch()
    monkeypatch.setattr(caption_metrics, "_package", lambda: tmp_path / "package")


def with_spice(script):
    return f'case "$*" in *PTBTokenizer*) exec cat;; *spice-1.0.jar*) cp "$5" {{seen}}; {script};; esac'


def test_spice_is_the_mean_over_a_group(fake_java, with_corenlp, no_meteor, tmp_path):
    rows = [{"image_id": place, "scores": {"All": {"f": f}}} for place, f in ((1, 0.5), (0, 0.25))]
    script = with_spice(f"echo '{json.dumps(rows)}' > \"$7\"").replace("{seen}", f"{tmp_path}/seen.json")
    fake_java(script)
    references, candidates = {"7": ["a dog"], "8": ["a cat", "the cat"]}, {"7": "dog", "8": "cat"}
    found = score_captions(references, candidates, {"all": ["7", "8"], "first": ["7"]})
    assert [scores["SPICE"] for scores in found.scores.values()] == [0.375, 0.25]
    assert json.loads((tmp_path / "seen.json").read_text()) == [
        {"image_id": 0, "test": "dog", "refs": ["a dog"]},
        {"image_id": 1, "test": "cat", "refs": ["a cat", "the cat"]},
    ]


@pytest.mark.parametrize("place", ["{}", "../corenlp"])
def test_spice_takes_corenlp_from_its_own_folder(fake_java, with_corenlp, no_meteor, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path / "package")  # a relative path is the user's, not that of the folder Java runs in
    folder = tmp_path / "corenlp"
    (tmp_path / "package" / "spice" / "lib").rename(folder)
    monkeypatch.setenv("CORENLP_HOME", place.format(folder))
    rows = [{"image_id": 0, "scores": {"All": {"f": 0.5}}}]
    script = f'echo "$3" > {tmp_path}/classes; echo \'{json.dumps(rows)}\' > "$7"'
    fake_java(with_spice(script).replace("{seen}", "/dev/null"))
    assert score_captions(*ONE).scores["all"]["SPICE"] == 0.5
    classes = (tmp_path / "classes").read_text().strip().split(os.pathsep)
    assert classes == ["spice-1.0.jar", *(str(folder / jar) for jar in caption_metrics.CORENLP_JARS)]


def test_a_folder_without_corenlp_is_named_unless_the_package_has_it(
    fake_java, with_corenlp, no_meteor, tmp_path, monkeypatch
):
    monkeypatch.setenv("CORENLP_HOME", str(tmp_path))
    rows = [{"image_id": 0, "scores": {"All": {"f": 0.5}}}]
    fake_java(with_spice(f"echo '{json.dumps(rows)}' > \"$7\"").replace("{seen}", "/dev/null"))
    assert score_captions(*ONE).scores["all"]["SPICE"] == 0.5
    (tmp_path / "package" / "spice" / "lib" / caption_metrics.CORENLP_JARS[1]).unlink()
    reason = score_captions(*ONE).not_computed["SPICE"]
    assert f"CORENLP_HOME={tmp_path} lacks stanford-corenlp-3.6.0.jar" in reason


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo InaccessibleObjectException >&2; exit 1", "exit code 1: InaccessibleObjectException"),
        ("exit 0", "without scores"),
        ('echo "[]" > "$7"', "without scores"),
        ('echo "[{" > "$7"', "without scores"),
        (HANGS, "did not finish within 1 s"),
    ],
)
def test_a_spice_that_fails_leaves_the_others(fake_java, with_corenlp, no_meteor, tmp_path, script, reason):
    fake_java(with_spice(script).replace("{seen}", f"{tmp_path}/seen.json"))
    found = score_captions(*ONE)
    assert reason in found.not_computed["SPICE"]
    assert set(found.scores["all"]) == {*OVERLAP, "n"}
