"""`xformer data shard`: any source in, the same samples out; whole shards or none."""

import io
import json
import tarfile

import pytest
from made import jpeg, shards, write_image, write_json
from PIL import Image

from xformer_mllm.commands import ShardConfig
from xformer_mllm.data import shard_writer
from xformer_mllm.data.shard_writer import shard
from xformer_mllm.data.shards import read_shard
from xformer_mllm.data.sources import open_captions, open_questions
from xformer_mllm.model.images import load_image


def blip(folder, number=25):
    rows = [
        {"image": write_image(folder / f"{place}.jpg", place).name, "caption": [f"caption {place}", "another"]}
        for place in range(number)
    ]
    return str(write_json(folder / "blip.json", rows))


def config(source, folder, **settings):
    return ShardConfig(source=str(source), output_dir=folder / "out", **{"samples_per_shard": 10, **settings})


def contents(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def records(folder):
    return [record for path in sorted(folder.glob("*.tar")) for record in read_shard(path)]


def test_layout_is_img2datasets(tmp_path):
    out = shard(config(blip(tmp_path), tmp_path))
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{place:05}{end}" for place in range(3) for end in (".tar", "_stats.json")),
        "shards.json",
    ]
    files = contents(out / "00001.tar")
    assert list(files)[:3] == ["000010000.jpg", "000010000.txt", "000010000.json"]
    assert files["000010003.jpg"] == jpeg(13)  # the very file
    assert files["000010003.txt"] == b"caption 13"
    assert json.loads(files["000010003.json"]) == {
        "key": "000010003",
        "id": "13.jpg",
        "status": "success",
        "captions": ["caption 13", "another"],
        "caption": "caption 13",
        **dict.fromkeys(("width", "height", "original_width", "original_height"), 8),
    }
    assert json.loads((out / "00002_stats.json").read_text()) == {"count": 5, "successes": 5, "failed": 0}


def test_captions_and_questions_survive(tmp_path):
    rows = [
        {
            "image": write_image(tmp_path / "a.jpg").name,
            "question": "Why?",
            "answers": ["so", "because"],
            "question_id": 3,
        },
        {"image": "a.jpg", "caption": ["a cat", "one cat"]},
    ]
    out = shard(config(write_json(tmp_path / "q.json", rows), tmp_path))
    (record,) = records(out)
    assert record["captions"] == ["a cat", "one cat"]
    assert record["questions"] == [{"id": "3", "question": "Why?", "answers": ["so", "because"]}]
    (items,) = [next(iter(open_questions(str(out), "train"))) for _ in range(1)]
    assert items[0]["question"] == "Why?"


def test_shards_can_be_trained_on_and_know_their_size(tmp_path):
    out = shard(config(blip(tmp_path), tmp_path))
    mixture = write_json(tmp_path / "m.json", {"sources": [{"source": "out"}]})
    assert next(iter(open_captions(str(mixture), "train")))["caption"]
    assert len(records(out)) == 25


def test_shards_of_shards(tmp_path):
    out = shard(config(shards(tmp_path / "in", 3, 7), tmp_path))
    assert [record["captions"] for record in records(out)] == [[f"caption {place}"] for place in range(21)]


def test_broken_samples_leave_a_gap(tmp_path, caplog):
    source = blip(tmp_path)
    (tmp_path / "12.jpg").write_bytes(b"no image")
    out = shard(config(source, tmp_path))
    names = [record["id"] for record in records(out)]
    assert "00001/000010002" not in names
    assert len(names) == 24
    assert "12.jpg" in caplog.text
    assert json.loads((out / "00001_stats.json").read_text()) == {"count": 10, "successes": 9, "failed": 1}


def test_more_than_ten_broken_stop(tmp_path):
    source = blip(tmp_path)
    for place in range(12):
        (tmp_path / f"{place}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"12 of 1,000 samples cannot be read, .*0\.jpg, .*: not a readable image"):
        shard(config(source, tmp_path))


def test_a_killed_run_goes_on_with_the_first_missing_shard(tmp_path, monkeypatch):
    source = blip(tmp_path)
    asked = []

    def dies_at(number):
        def load(image):
            asked.append(image)
            if len(asked) == number:
                raise KeyboardInterrupt
            return load_image(image)

        monkeypatch.setattr(shard_writer, "load_image", load)

    dies_at(15)
    with pytest.raises(KeyboardInterrupt):
        shard(config(source, tmp_path))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "00000_stats.json", "shards.json"]
    (out / "00001.tar").write_bytes(b"a tar without its stats: killed between the two")
    first = (out / "00000.tar").stat().st_mtime_ns
    asked.clear()
    dies_at(-1)
    shard(config(source, tmp_path))
    assert len(asked) == 15
    assert (out / "00000.tar").stat().st_mtime_ns == first
    assert len(records(out)) == 25
    asked.clear()
    shard(config(source, tmp_path))
    assert not asked


def test_shards_do_not_depend_on_when_they_were_written(tmp_path):
    source = blip(tmp_path)
    one = shard(ShardConfig(source=source, output_dir=tmp_path / "a"))
    two = shard(ShardConfig(source=source, output_dir=tmp_path / "b"))
    assert (one / "00000.tar").read_bytes() == (two / "00000.tar").read_bytes()


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match=r"00000\.tar: cannot be written \(No space left on device\)"):
        shard(config(blip(tmp_path), tmp_path))
    assert [path.name for path in (tmp_path / "out").glob("0*")] == []


@pytest.mark.parametrize(
    ("name", "made", "expected"),
    [
        ("a.jpg", lambda path: Image.new("RGB", (90, 60)).save(path), ("jpg", (30, 20))),
        ("b.jpg", lambda path: Image.new("RGB", (30, 20)).save(path), ("jpg", (30, 20))),
        ("c.png", lambda path: Image.new("RGBA", (10, 10)).save(path), ("png", (10, 10))),
        ("d.bmp", lambda path: Image.new("L", (10, 10)).save(path), ("png", (10, 10))),
        ("e.png", lambda path: Image.new("RGB", (20, 80)).save(path), ("png", (20, 80))),
        ("f.png", lambda path: Image.new("RGB", (21, 84)).save(path), ("jpg", (20, 80))),
        ("g.webp", lambda path: Image.new("RGB", (10, 10)).save(path), ("webp", (10, 10))),
    ],
)
def test_shortest_side_and_formats(tmp_path, name, made, expected):
    made(tmp_path / name)
    source = write_json(tmp_path / "a.json", [{"image": name, "caption": "a"}])
    out = shard(config(source, tmp_path, shortest_side=20))
    suffix, size = expected
    files = contents(out / "00000.tar")
    with Image.open(io.BytesIO(files[f"000000000.{suffix}"])) as image:
        assert image.size == size
    about = json.loads(files["000000000.json"])
    assert (about["width"], about["height"]) == size


def test_splits(tmp_path):
    images = [
        {"filename": write_image(tmp_path / f"{split}.jpg").name, "split": split, "sentences": [{"raw": split}]}
        for split in ("train", "restval", "val", "test")
    ]
    source = write_json(tmp_path / "dataset_coco.json", {"images": images})
    out = shard(config(source, tmp_path))
    assert [record["captions"] for record in records(out)] == [["train"], ["restval"]]
    other = shard(ShardConfig(source=str(source), output_dir=tmp_path / "val", split="validation"))
    assert [record["captions"] for record in records(other)] == [["val"]]
    with pytest.raises(ValueError, match="has no split 'dev'; --split takes train, validation, test"):
        shard(config(source, tmp_path, split="dev"))


def test_another_request_does_not_go_into_the_same_folder(tmp_path):
    source = blip(tmp_path)
    shard(config(source, tmp_path))
    with pytest.raises(ValueError, match="holds other shards"):
        shard(config(source, tmp_path, samples_per_shard=5))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(ValueError, match="exists and is not empty"):
        shard(ShardConfig(source=source, output_dir=tmp_path / "full"))


def test_mixtures_and_impossible_numbers(tmp_path):
    shards(tmp_path / "in", 1, 2)
    mixture = write_json(tmp_path / "m.json", {"sources": [{"source": "in", "weight": 1}]})
    with pytest.raises(ValueError, match="is a mixture; shard each"):
        shard(config(mixture, tmp_path))
    for settings in ({"samples_per_shard": 0}, {"shortest_side": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            config("x", tmp_path, **settings)
