"""`xformer data inspect` on every kind of source."""

import json
import re

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from made import jpeg, shards, write_image, write_json
from PIL import Image, ImageDraw

from xformer_mllm.commands import InspectConfig
from xformer_mllm.data.inspect import SAMPLES, contact_sheet, inspect
from xformer_mllm.data.sources import open_captions


def run(tmp_path, capsys, source, **settings):
    """(findings, printed text)"""
    config = InspectConfig(source=str(source), sheet=tmp_path / "sheets" / "sheet.png", **settings)
    findings = inspect(config)
    return findings, re.sub(r" +", " ", capsys.readouterr().out)


def test_folder(tmp_path, capsys):
    for place in range(10):
        write_image(tmp_path / "in" / f"{place}.jpg").with_suffix(".txt").write_text("a " * (place + 1))
    Image.new("RGB", (40, 20)).save(tmp_path / "in" / "9.jpg")
    write_image(tmp_path / "in" / "x.jpg")
    (tmp_path / "in" / "3.jpg").write_bytes(b"no image")
    (findings,), said = run(tmp_path, capsys, tmp_path / "in")
    for line in (
        "format a folder of images with a .txt beside each",
        "images 10, 10 captions, 0 questions",
        "splits none",
        "skipped 1 without a .txt",
        "decoded 10 images",
        "size width 8 / 8 / 40, height 8 / 8 / 20",
        "captions 1.0 per image; words 1 / 5 / 10",
        "broken 1\n",
        "3.jpg: ",
    ):
        assert line in said
    assert list(findings.broken) == ["3.jpg"]
    with Image.open(tmp_path / "sheets" / "sheet.png") as sheet:
        assert sheet.width > 1000


def test_shards(tmp_path, capsys):
    folder = shards(tmp_path / "in", 4, 25, broken=(3,))
    (folder / "00002.tar").write_bytes((folder / "00002.tar").read_bytes()[:20_000])
    (findings,), said = run(tmp_path, capsys, folder)
    assert "images unknown (no _stats.json)" in said
    assert "splits none" in said
    assert "broken " in said
    assert set(findings.broken) == {"00000/000000003", str(folder / "00002.tar")}
    for place in range(4):
        write_json(folder / f"{place:05}_stats.json", {"successes": 25})
    (findings,), said = run(tmp_path, capsys, folder)
    assert "images 100\n" in said
    assert findings.lost == 1 + 100 - findings.decoded + 1  # the sample, and what the shard lost


def test_few_images_are_spread_over_all(tmp_path, capsys):
    (findings,), said = run(tmp_path, capsys, shards(tmp_path / "in", 20, 10), max_images=20)
    assert "decoded 20 images" in said
    seen = {int(caption.split()[1]) // 100 for caption in findings.captions}
    assert seen == {0, 1}
    rows = [{"image": write_image(tmp_path / f"{n}.jpg").name, "caption": str(n)} for n in range(100)]
    (findings,), said = run(tmp_path, capsys, write_json(tmp_path / "a.json", rows), max_images=10)
    assert "images 100, 100 captions" in said
    assert [int(caption) for caption in findings.captions] == list(range(0, 100, 10))


@pytest.mark.parametrize("images", [0, 1000])
def test_all(tmp_path, capsys, images):
    _, said = run(tmp_path, capsys, shards(tmp_path / "in", 12, 5), max_images=images)
    assert f"decoded {60 if images == 0 else 50} images" in said  # ten of the twelve shards


def test_shards_cut_short_are_found_without_reading_them(tmp_path, capsys):
    folder = shards(tmp_path / "in", 30, 2)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:2000])
    (findings,), _ = run(tmp_path, capsys, folder, max_images=10)
    assert findings.broken[str(folder / "00001.tar")] == "the shard is truncated or missing"


def test_questions_and_splits(tmp_path, capsys):
    rows = [
        {"image": write_image(tmp_path / "a.jpg").name, "question": "How many cats?", "answers": ["one", "1"]},
        {"image": "a.jpg", "question": "Why?", "answer": "because"},
    ]
    (findings,), said = run(tmp_path, capsys, write_json(tmp_path / "q.json", rows))
    assert "images 1, 0 captions, 2 questions" in said
    assert "questions 2.0 per image; words 1 / 1 / 3" in said
    (_, texts) = findings.samples[1]
    assert texts == ["How many cats? one, 1", "Why? because"]
    images = [
        {"filename": "a.jpg", "split": split, "sentences": [{"raw": "a"}] * 5}
        for split in ("train", "val", "val", "test")
    ]
    _, said = run(tmp_path, capsys, write_json(tmp_path / "k.json", {"images": images}))
    assert "splits train 1, validation 2, test 1" in said
    assert "images 4, 20 captions" in said


def test_whatever_share_is_broken_is_reported(tmp_path, capsys):
    rows = [{"image": write_image(tmp_path / f"{n}.jpg").name, "caption": str(n)} for n in range(2)]
    rows.append({"image": "0.jpg"})
    listed = write_json(tmp_path / "a.json", rows)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = write_json(tmp_path / "m.json", {"sources": [{"source": "a.json"}]})
    for source in (listed, tmp_path / "b.jsonl", mixture):
        (findings,), said = run(tmp_path, capsys, source)
        assert findings.lost == 1
        assert 'neither "caption" nor "question"' in said
    with pytest.raises(ValueError, match="1 of 3 records cannot be read"):
        open_captions(str(listed), "train")


def test_rows_without_a_caption_are_broken_once(tmp_path, capsys):
    columns = {"image": [{"bytes": jpeg(n), "path": None} for n in range(3)], "caption": ["a", "", "c"]}
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "in")
    capsys.readouterr()
    (findings,), said = run(tmp_path, capsys, tmp_path / "in")
    assert findings.broken == {"row 1": "an empty caption"}
    assert "broken 1\n" in said


def test_mixture(tmp_path, capsys):
    shards(tmp_path / "one", 1, 5)
    shards(tmp_path / "two", 1, 5)
    sources = [{"source": "one", "weight": 1}, {"source": "two", "weight": 2}]
    findings, said = run(tmp_path, capsys, write_json(tmp_path / "m.json", {"sources": sources}))
    assert len(findings) == 2
    assert said.count("decoded 5 images") == 2


def test_contact_sheet_has_rows_of_six():
    image = Image.new("RGB", (300, 300), "red")
    one, six, seven, many = (
        contact_sheet([(image, ["a red square " * 20])] * number) for number in (1, 6, 7, SAMPLES)
    )
    assert one.width < six.width == seven.width == many.width
    assert one.height == six.height < seven.height < many.height
    assert six.getpixel((100, 100)) == (255, 0, 0)


def test_texts_fill_the_lines_below_an_image(monkeypatch):
    lines = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda draw, place, line, *_: lines.append(line))

    def drawn(*texts):
        lines.clear()
        contact_sheet([(Image.new("RGB", (300, 300), "red"), list(texts))])
        return list(lines)

    assert drawn("How many cats? one, 1", "Why? because") == ["How many cats? one, 1", "Why? because"]
    many = [f"Question {number} of many? yes" for number in range(8)]
    assert drawn(*many) == [*many[:5], "Question 5 of many? yes …"]
    long = drawn("a red square " * 20)
    assert (len(long), long[-1][-2:]) == (3, " …")
    assert max(map(len, long)) <= 34


def test_no_readable_image(tmp_path, capsys):
    findings, said = run(tmp_path, capsys, shards(tmp_path / "in", 1, 3, broken=range(3)))
    assert findings[0].lost == 3
    assert "sheet" not in said
    assert not (tmp_path / "sheets").exists()
    with pytest.raises(ValueError, match="--max-images must not be negative"):
        InspectConfig(source="x", max_images=-1)
