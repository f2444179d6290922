"""CaptionFolder: images with a .txt beside each, and what is wrong with real folders."""

import logging
import pickle

import pytest
from PIL import Image

from xformer_mllm.data.captions import CaptionFolder


def add(folder, name, caption=None, colour="red"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def test_items_are_sorted_and_recursive(tmp_path):
    add(tmp_path, "b.png", "A blue square.", "blue")
    add(tmp_path, "a/z.JPG", "A red square.\n")
    dataset = CaptionFolder(tmp_path)
    assert len(dataset) == 2
    assert [(item["id"], item["caption"]) for item in dataset] == [
        ("a/z.JPG", "A red square."),
        ("b.png", "A blue square."),
    ]
    assert dataset[1]["image"].mode == "RGB"
    assert dataset[1]["image"].getpixel((0, 0)) == (0, 0, 255)
    assert dataset[-1]["id"] == "b.png"
    with pytest.raises(IndexError):
        dataset[2]


@pytest.mark.parametrize(
    "text", ["A coin.\nde.utf8=Eine Münze.\n", "\n \nA coin.\n", "\ufeffA coin.", "  A coin.  \r\nfr.utf8=Une pièce."]
)
def test_caption_is_the_first_line_with_text(tmp_path, text):
    add(tmp_path, "coin.png", text)
    assert CaptionFolder(tmp_path)[0]["caption"] == "A coin."


def test_caption_that_is_not_utf8(tmp_path):
    add(tmp_path, "coin.png").with_suffix(".txt").write_bytes("A Münze.".encode("latin-1"))
    assert CaptionFolder(tmp_path)[0]["caption"] == "A M\ufffdnze."


def test_left_out_images_are_counted_in_one_line(tmp_path, caplog):
    add(tmp_path, "good.png", "Good.")
    add(tmp_path, "no_text.png")
    add(tmp_path, "empty.png", " \n\n")
    add(tmp_path, "empty_too.png", "")
    (tmp_path / "drawing.svg").write_text("<svg/>")
    (tmp_path / "drawing.txt").write_text("A drawing.")
    with caplog.at_level(logging.WARNING):
        dataset = CaptionFolder(tmp_path)
    assert [item["id"] for item in dataset] == ["good.png"]
    assert dataset.skipped == {"without a .txt": 1, "with an empty .txt": 2, "in SVG, which is not read": 1}
    (line,) = caplog.messages
    assert "1 images with captions" in line
    assert "1 without a .txt, 2 with an empty .txt, 1 in SVG" in line


def test_complete_folder_says_nothing(tmp_path, caplog):
    add(tmp_path, "good.png", "Good.")
    CaptionFolder(tmp_path)
    assert not caplog.messages


def test_broken_image_is_replaced_by_the_next(tmp_path, caplog):
    for i in range(200):
        add(tmp_path, f"{i:03}.png", f"Number {i}.")
    (tmp_path / "007.png").write_bytes(b"broken")
    (tmp_path / "199.png").write_bytes(b"broken")
    dataset = CaptionFolder(tmp_path)
    assert [dataset[7]["id"] for _ in range(2)] == ["008.png", "008.png"]
    assert dataset[199]["caption"] == "Number 0."  # the next after the last is the first
    assert sorted(dataset.broken) == ["007.png", "199.png"]
    assert [("007.png" in line, "199.png" in line) for line in caplog.messages] == [(True, False), (False, True)]


def test_more_than_one_percent_broken_stops(tmp_path):
    for i in range(200):
        add(tmp_path, f"{i:03}.png", f"Number {i}.")
    for i in range(3):
        (tmp_path / f"{i:03}.png").write_bytes(b"broken")
    dataset = CaptionFolder(tmp_path)
    with pytest.raises(ValueError, match=r"3 of 200 images cannot be read.*000\.png, 001\.png, 002\.png") as error:
        dataset[0]
    assert "\n" not in str(error.value)


def test_only_broken_images_stop(tmp_path):
    add(tmp_path, "one.png", "One.").write_bytes(b"broken")
    with pytest.raises(ValueError, match="1 of 1 images"):
        CaptionFolder(tmp_path)[0]


def test_image_that_vanished_counts_as_broken(tmp_path):
    for i in range(100):
        add(tmp_path, f"{i:03}.png", f"Number {i}.")
    dataset = CaptionFolder(tmp_path)
    (tmp_path / "000.png").unlink()
    assert dataset[0]["id"] == "001.png"


def test_empty_folder_shows_the_layout(tmp_path):
    add(tmp_path, "lonely.png")
    with pytest.raises(ValueError, match=r"1 without a \.txt.*cat\.jpg and beside it cat\.txt"):
        CaptionFolder(tmp_path)


def test_missing_folder_and_file_instead_of_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CaptionFolder(tmp_path / "missing")
    path = add(tmp_path, "image.png", "An image.")
    with pytest.raises(ValueError, match="not a folder"):
        CaptionFolder(path)


def test_splits_are_disjoint_complete_and_stay_when_images_are_added(tmp_path):
    for i in range(100):
        add(tmp_path, f"{i:03}.png", f"Number {i}.")
    ids = {split: {item["id"] for item in CaptionFolder(tmp_path, split)} for split in ("train", "validation")}
    assert not ids["train"] & ids["validation"]
    assert len(ids["train"] | ids["validation"]) == 100
    assert 3 <= len(ids["validation"]) <= 20
    add(tmp_path, "0000.png", "New.")
    assert ids["validation"] <= {item["id"] for item in CaptionFolder(tmp_path, "validation")}


def test_few_images_still_have_one_for_validation(tmp_path):
    for name in ("a", "b", "c"):
        add(tmp_path, f"{name}.png", name)
    train, validation = (CaptionFolder(tmp_path, split, 0.0) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (2, 1)
    assert {item["id"] for item in train} | {item["id"] for item in validation} == {"a.png", "b.png", "c.png"}


def test_one_image_cannot_be_split(tmp_path):
    add(tmp_path, "one.png", "One.")
    with pytest.raises(ValueError, match="one image cannot be split"):
        CaptionFolder(tmp_path, "train")


def test_worker_processes_can_take_it(tmp_path):
    add(tmp_path, "one.png", "One.")
    assert pickle.loads(pickle.dumps(CaptionFolder(tmp_path)))[0]["id"] == "one.png"
