"""Write a benchmark's official files as the documents that the tasks in this folder read (docs/lmms-eval.md).

    python examples/lmms_eval/documents.py {gqa,vqav2,coco-captions} DATA [--split SPLIT]

DATA is the folder that `xformer evaluate --data` takes. The documents go to lmms-eval/BENCHMARK.jsonl in the working folder;
images stay where they are.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xformer_mllm.evaluate.coco_captions import CocoCaptions
from xformer_mllm.evaluate.gqa import Gqa
from xformer_mllm.evaluate.vqav2 import Vqav2
from xformer_mllm.files import write_whole

BENCHMARKS = {"gqa": Gqa, "vqav2": Vqav2, "coco-captions": CocoCaptions}


def documents(benchmark: Any) -> Iterator[dict]:
    """With the fields that lmms-eval's own scorers read."""
    for record in benchmark.records:
        document = {"id": record.id, "question_id": record.id, "image": str(benchmark.image_file(record).resolve())}
        if isinstance(benchmark, CocoCaptions):
            yield document | {"answer": benchmark.references[record.image_id]}
        else:
            answers = [{"answer": answer, "answer_id": number} for number, answer in enumerate(record.answers)]
            yield document | {"question": record.question, "answer": record.answer, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split")
    arguments = parser.parse_args()
    kind = BENCHMARKS[arguments.benchmark]
    split = arguments.split or kind.splits[0]
    if split not in kind.splits:
        parser.error(f"--split {split}: choose one of {', '.join(kind.splits)}")
    try:
        rows = list(documents(kind(arguments.data, split)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    output = Path("lmms-eval") / f"{arguments.benchmark}.jsonl"
    output.parent.mkdir(exist_ok=True)
    write_whole(output, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{output}: {len(rows)} documents of {kind.name} {split}")


if __name__ == "__main__":
    main()
