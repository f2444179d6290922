"""Hugging Face data sets, saved to disk and streamed; all made here, nothing is fetched."""

from itertools import islice

import datasets
import pytest
from made import jpeg

from xformer_mllm.data.huggingface import find_on_hub, is_saved, read_saved
from xformer_mllm.data.records import CaptionItems
from xformer_mllm.data.sources import find_source
from xformer_mllm.data.streams import ShardPart, Stream


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def made(number=30, **columns):
    columns = columns or {"caption": [f"caption {place}" for place in range(number)]}
    images = [{"bytes": jpeg(place), "path": None} for place in range(len(next(iter(columns.values()))))]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def on_hub(folder, number=3, each=10):
    """Parquet files in a folder, which `load_dataset` takes for a data set as one on the Hub."""
    folder.mkdir()
    whole = made(number * each)
    for place in range(number):
        part = whole.select(range(place * each, (place + 1) * each))
        part.to_parquet(str(folder / f"train-{place:05}-of-{number:05}.parquet"))
    return f"hf:{folder}"


def test_saved(tmp_path):
    made(3).save_to_disk(str(tmp_path))
    assert is_saved(tmp_path)
    found = read_saved(tmp_path)
    rows = found.rows[""]
    assert rows[1] == {"id": "1", "image": jpeg(1), "captions": ["caption 1"], "questions": []}
    assert (len(rows), list(rows.ids()), list(rows.counts["captions"])) == (3, ["0", "1", "2"], [1, 1, 1])
    assert list(rows.counts["questions"]) == [0, 0, 0]


def test_saved_splits(tmp_path):
    whole = made(6)
    splits = {"train": whole, "val": whole.select(range(2)), "test": whole.select(range(1))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path))
    assert is_saved(tmp_path)
    assert {split: len(rows) for split, rows in read_saved(tmp_path).rows.items()} == {
        "train": 6,
        "validation": 2,
        "test": 1,
    }


@pytest.mark.parametrize(
    ("columns", "captions", "questions"),
    [
        ({"text": ["a"], "image_id": [7]}, ["a"], []),
        ({"captions": [["a", "", "b"]]}, ["a", "b"], []),
        ({"sentences": [[{"raw": "a"}, {"raw": "b"}]]}, ["a", "b"], []),
        (
            {"question": ["?"], "answers": [["yes", "no"]]},
            [],
            [{"id": "0/0", "question": "?", "answers": ["yes", "no"]}],
        ),
        (
            {"question": ["?"], "answer": ["yes"], "question_id": [5]},
            [],
            [{"id": "5", "question": "?", "answers": ["yes"]}],
        ),
    ],
)
def test_columns(tmp_path, columns, captions, questions):
    made(1, **columns).save_to_disk(str(tmp_path))
    record = read_saved(tmp_path).rows[""][0]
    assert (record["captions"], record["questions"]) == (captions, questions)
    assert record["id"] == ("7" if "image_id" in columns else "0")


def test_columns_that_say_nothing(tmp_path):
    made(1, label=[3]).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"needs a column of images.*its columns are image, label"):
        read_saved(tmp_path)


def test_rows_without_a_caption_are_counted(tmp_path):
    made(1, caption=["a"] * 199 + [""]).save_to_disk(str(tmp_path / "few"))
    assert read_saved(tmp_path / "few").broken == {"row 199": "an empty caption"}
    made(1, caption=["a"] * 9 + [""]).save_to_disk(str(tmp_path / "many"))
    with pytest.raises(ValueError, match="1 of 10 records"):
        find_source(str(tmp_path / "many"))


def test_streamed(tmp_path):
    found = find_on_hub(on_hub(tmp_path / "set"))
    assert found.shards == {"train": ["train/0", "train/1", "train/2"]}
    records = list(found.read("train/1"))
    assert [record["id"] for record in records] == [f"train/1/{place}" for place in range(10)]
    assert (records[2]["image"], records[2]["captions"]) == (jpeg(12), ["caption 12"])
    assert [record["id"] for record in found.read("train/0", lambda place, name: place == 4)] == ["train/0/4"]


def test_a_stream_that_breaks_off_says_how_much_is_lost(tmp_path):
    found = find_on_hub(on_hub(tmp_path / "set"))
    shard = next((tmp_path / "set").rglob("*00001*"))
    shard.write_bytes(shard.read_bytes()[:-50])
    stated = [{"name": "train", "num_examples": 30}]  # as the hub does
    found.datasets["train"].info.splits = datasets.SplitDict.from_split_dict(stated, "set")
    (record,) = found.read("train/1")
    assert "reading stopped" in record["broken"]
    assert record["lost"] == 10


@pytest.mark.parametrize("world", [1, 3, 5])
def test_stream_of_one(tmp_path, world):
    part = ShardPart("s", find_on_hub(on_hub(tmp_path / "set")), "train")
    streams = [Stream("s", [part], CaptionItems(None, 0), 0, rank, world, buffer=4) for rank in range(world)]
    found = [item["id"] for stream in streams for item in islice(stream, 30 // world)]
    assert len(found) == len(set(found)) == 30


def test_one_that_cannot_be_had():
    with pytest.raises(ValueError, match="hf:nobody/nothing: cannot be opened") as error:
        find_on_hub("hf:nobody/nothing")
    assert "\n" not in str(error.value)
