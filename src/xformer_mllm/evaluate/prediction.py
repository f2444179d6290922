"""Answer a benchmark's records in batches, over several processes, and resume a killed run.

Each answered batch is appended to `parts/` in the output folder. Rounding can make an answer depend on the other records
of its batch, so the batches do not depend on the number of processes or on resuming.

Several processes: `torchrun --nproc-per-node N -m xformer_mllm evaluate ...`, or accelerate launch.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.benchmark import Benchmark, CaptionRecord
from xformer_mllm.files import write_whole
from xformer_mllm.inference import GenerationSettings, generate

Record = Question | CaptionRecord


@dataclass(frozen=True)
class Answers:
    """answers: {record id: answer}; problems: {image id: why its image could not be read}."""

    answers: Mapping[str, str]
    problems: Mapping[str, str]


def predict(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    settings: GenerationSettings,
    output_dir: Path,
    batch_size: int,
    workers: int = 0,
    made_by: Mapping[str, Any] | None = None,
) -> Answers:
    """Answer every record whose image can be read.

    Args:
        model, processor: of stage 2, on their device.
        output_dir: folder of `parts/`; call `remove_parts` after the answers are written.
        batch_size: records per batch; each image is encoded once per batch.
        workers: processes that load images, per answering process.
        made_by: identity of the model and data; `parts/` of a run with another one is refused.

    Raises:
        ValueError: if `parts/` belongs to another run, or a prompt is longer than the language model reads.
    """
    parts = output_dir / "parts"
    state = PartialState()
    if state.is_main_process:
        open_parts(parts, {"settings": asdict(settings), "batch_size": batch_size, **(made_by or {})})
        # Merge the complete rows of an interrupted run into one file: it may have had more processes.
        write_whole(parts / "before.jsonl", "".join(map(_line, _read_parts(parts).values())))
        for old in parts.glob("process-*.jsonl"):
            old.unlink()
    state.wait_for_everyone()
    # Assign batches whether done or not: another process may already be writing some.
    mine = _batches(benchmark.records, batch_size)[state.process_index :: state.num_processes]
    done = _read_parts(parts)
    if done and state.is_main_process:
        print(f"resuming: {len(done):,} of {len(benchmark.records):,} answers found in {parts}")
    mine = [batch for batch in mine if any(record.id not in done for record in batch)]
    model.eval()
    device = next(model.parameters()).device
    loader = DataLoader(ImageBatches(mine, benchmark, processor), batch_size=None, num_workers=workers)
    bar = tqdm(total=sum(map(len, mine)), unit="record", desc=f"process {state.process_index}")
    with (parts / f"process-{state.process_index}.jsonl").open("a", encoding="utf-8") as file, bar:
        images = 0
        for readable, pixels, problems in loader:
            lines = [{"id": record_id, "problem": problem} for record_id, problem in problems.items()]
            if readable:
                texts = _answer(model, processor, readable, pixels.to(device), settings)
                lines += [{"id": r.id, "answer": text} for r, text in zip(readable, texts, strict=True)]
                images += len(pixels)
            file.write("".join(map(_line, lines)))
            file.flush()
            bar.update(len(lines))
            bar.set_postfix_str(f"{images / max(bar.format_dict['elapsed'], 1e-9):.1f} images/s")
    state.wait_for_everyone()
    rows = _read_parts(parts)
    found = [(record, rows[record.id]) for record in benchmark.records]
    return Answers(
        {record.id: row["answer"] for record, row in found if "answer" in row},
        {record.image_id: row["problem"] for record, row in found if "problem" in row},
    )


def remove_parts(output_dir: Path) -> None:
    """Remove `parts/`, once its content is written elsewhere."""
    shutil.rmtree(output_dir / "parts")


def _batches(records: Sequence[Record], batch_size: int) -> list[list[Record]]:
    """All records in batches, with the records of one image next to each other."""
    order = {image_id: index for index, image_id in enumerate(dict.fromkeys(r.image_id for r in records))}
    ordered = sorted(records, key=lambda record: order[record.image_id])
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def open_parts(parts: Path, made_by: Mapping[str, Any]) -> None:
    """Create the folder. Raises ValueError if it belongs to another run."""
    about = parts / "run.json"
    text = json.dumps(made_by, indent=2, default=str) + "\n"
    if about.is_file() and about.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{parts}: results of an interrupted run with another model, data or settings; "
            "delete the folder, or name another --output-dir"
        )
    write_whole(about, text)


def _read_parts(parts: Path) -> dict[str, dict[str, str]]:
    """Complete rows by record id. A last line without a line break was cut when its process was killed."""
    rows: dict[str, dict[str, str]] = {}
    for path in sorted(parts.glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:  # bytes, as the cut may be within a character
            row = json.loads(line)
            rows[row["id"]] = row
    return rows


def _line(row: Mapping[str, str]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _answer(
    model: Any, processor: Any, records: Sequence[Record], pixels: torch.Tensor, settings: GenerationSettings
) -> list[str]:
    """One answer per record. pixels: the distinct images of the records, in the order of their first record."""
    images = list(dict.fromkeys(record.image_id for record in records))
    prompts = [settings.prompt_for(getattr(record, "question", "")) for record in records]
    index = torch.tensor([images.index(record.image_id) for record in records])
    return [found.text.strip() for found in generate(model, processor, prompts, pixels, index, **settings.options())]


class ImageBatches(Dataset):
    """Batches of records -> (readable records, pixels of their distinct images or None, {record id: problem})."""

    def __init__(self, batches: Sequence[Sequence[Any]], benchmark: Any, processor: Any):
        self.batches, self.benchmark, self.processor = batches, benchmark, processor

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[list[Any], torch.Tensor | None, dict[str, str]]:
        pixels: dict[str, torch.Tensor] = {}
        problems: dict[str, str] = {}
        for record in self.batches[index]:
            if record.image_id not in pixels and record.image_id not in problems:
                try:
                    inputs = self.processor(images=[self.benchmark.load(record)])
                except (OSError, ValueError) as error:
                    problems[record.image_id] = str(error)
                else:
                    pixels[record.image_id] = inputs["pixel_values"]
        readable = [record for record in self.batches[index] if record.image_id in pixels]
        unreadable = {r.id: problems[r.image_id] for r in self.batches[index] if r.image_id in problems}
        return readable, torch.cat(list(pixels.values())) if pixels else None, unreadable
