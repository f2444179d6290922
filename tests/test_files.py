"""JSON files say where they are wrong, and are never half written; text for messages."""

import itertools

import pytest

from xformer_mllm import files
from xformer_mllm.files import first_sentence, printable, read_json, read_json_lines, write_whole


def test_what_is_wrong_is_named_by_line_and_column(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(ValueError, match=r"questions\.json:2:7: not valid JSON"):
        read_json(path)
    path.write_text('{"a": 1}\n\n{"a": 2\n')
    with pytest.raises(ValueError, match=r"questions\.json:3:8: not valid JSON"):
        read_json_lines(path)
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_json(path)
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"id": ' + "1" * 5000 + "}", "a number has more than 4,300 digits"),
    ],
)
def test_what_python_cannot_hold_is_an_error_of_the_file(tmp_path, text, why):
    path = tmp_path / "answers.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"answers\.json: .*{why}"):
        read_json(path)
    path.write_text(f"{{}}\n{text}\n")
    with pytest.raises(ValueError, match=rf"answers\.json:2: .*{why}"):
        read_json_lines(path)


def test_a_line_separator_within_a_value_does_not_split_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "grün\u2028"}\n{"a": ""}\n', encoding="utf-8")
    assert read_json_lines(path) == [{"a": "grün\u2028"}, {"a": ""}]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_whole(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "The folder a.b was not found on the local disk. To enable look-ups, go online.",
            "The folder a.b was not found on the local disk",
        ),
        ("\nno network\nat all", "no network"),
        ("Weights only load failed.\nMore of it", "Weights only load failed"),
        ("x" * 200, "x" * 160),
        ("", ""),
    ],
)
def test_of_a_long_message_the_first_sentence_is_shown(message, shown):
    assert first_sentence(OSError(message)) == shown


def test_what_utf8_cannot_encode_is_printed_as_its_escape():
    assert printable("gr\udcfcn.png") == "gr\\udcfcn.png"
    assert printable("grün.png") == "grün.png"


@pytest.mark.parametrize("ahead", [1, 3, 10_000])
@pytest.mark.parametrize(
    "text",
    [
        "[]", " [ ] ", '\ufeff[1, 23, {"a": [1, "]"]}, "é\\n,["]', "[1.5e3,\n-2 , null]", "[[1], [2]]",
        "[1, 2", "[1,, 2]", "[1 2]", "[1] x", "[,1]", "[1,]", '[{"a": 1}, {"b"}]', '["a', "[" * 100_000, f"[{'1' * 5000}]",
    ],
)  # fmt: skip
def test_a_list_element_by_element_is_the_whole_list_or_its_error(tmp_path, monkeypatch, text, ahead):
    monkeypatch.setattr(files, "READ_AHEAD", ahead)
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert files.is_json_list(path)

    def outcome(read):
        try:
            return list(read(path))
        except ValueError as error:
            return str(error)

    assert outcome(files.read_json_list) == outcome(files.read_json)


def test_a_list_is_not_held(tmp_path):
    """Elements come before the file is read to its end, where it is broken."""
    path = tmp_path / "a.json"
    path.write_text("[" + "1, " * 2_000_000 + "x")
    assert list(itertools.islice(files.read_json_list(path), 1000)) == [1] * 1000
