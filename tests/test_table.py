"""Records on disk: what goes in comes out, in every process, and a long list takes little memory."""

import copy
import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from xformer_mllm.data.records import record_of
from xformer_mllm.data.table import ROWS, Table

NUMBER = ROWS + 300
QUESTION = {"id": "1", "question": "how many", "answers": ["2", "two"]}
RECORDS = [
    record_of(f"é{place}", f"a/b/{place}.jpg", [f"caption {place}"] * (place % 3), [QUESTION] * (place % 3 == 0))
    for place in range(NUMBER)
]


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(iter(RECORDS))


def test_records_come_back_by_place_in_order_and_selected(table):
    assert list(table) == RECORDS
    assert [table[place] for place in (0, ROWS - 1, ROWS, NUMBER - 1)] == [
        RECORDS[place] for place in (0, ROWS - 1, ROWS, NUMBER - 1)
    ]
    mixed = [NUMBER - 1, 0, 1, ROWS, ROWS - 1, 0]
    assert list(table.select(mixed)) == [RECORDS[place] for place in mixed]
    assert list(table.ids()) == [record["id"] for record in RECORDS]
    assert list(table.counts["captions"]) == [len(record["captions"]) for record in RECORDS]
    assert list(table.counts["questions"]) == [len(record["questions"]) for record in RECORDS]
    for outside in (-1, NUMBER):
        with pytest.raises(IndexError):
            table[outside]


def test_images_are_found_in_another_folder():
    table = Table(RECORDS[:2])
    table.find_images_in(Path("/images"), 1)
    assert [record["image"] for record in table] == ["/images/b/0.jpg", "/images/b/1.jpg"]


def test_copies_outlive_the_original():
    original = Table(RECORDS[:3])
    copies = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    del original
    assert all(list(one) == RECORDS[:3] for one in copies)


def first_of(table: Table):
    return table[0]


def test_a_spawned_process_reads_it_and_the_file_goes_with_its_owner(table):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_of, (table,)) == RECORDS[0]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(first_of, (table,)) == RECORDS[0]
    assert list(table)[-1] == RECORDS[-1]  # no worker removed it
    script = "from xformer_mllm.data.table import Table; t = Table([]); print(t._file.parent)"
    folder = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(folder).name.startswith("xformer-")
    assert not Path(folder).exists()


MEMORY = """
import sys
from pathlib import Path
from xformer_mllm.data.sources import open_captions

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

open_captions(sys.argv[1], "train")  # what is imported and allocated once
before = anonymous()
dataset = open_captions(sys.argv[2], "train")
print(len(dataset), anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_list_takes_less_than_200_bytes_a_row(tmp_path, form):
    number = 100_000
    (tmp_path / "0.jpg").touch()
    files = []
    for rows in (10, number):
        content = [
            {"image": f"{row}.jpg", "caption": f"a caption of row {row}, as long as others"} for row in range(rows)
        ]
        text = json.dumps(content) if form == "json" else "".join(json.dumps(row) + "\n" for row in content)
        files.append(tmp_path / f"{rows}.{form}")
        files[-1].write_text(text)
    done = subprocess.run([sys.executable, "-c", MEMORY, *files], capture_output=True, text=True, check=True)
    opened, more = map(int, done.stdout.split())
    assert opened > 0.9 * number
    assert more < 200 * number
