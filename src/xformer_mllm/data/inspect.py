"""`xformer data inspect`: the contents of a data source, its broken samples, and a contact sheet."""

import random
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import get_args

from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

from xformer_mllm.commands import InspectConfig
from xformer_mllm.data.formats import ListSource
from xformer_mllm.data.records import MAX_NAMED, Field, Record, open_image
from xformer_mllm.data.shards import ShardSource, TarShards
from xformer_mllm.data.sources import Mixture, find_source
from xformer_mllm.model.images import load_image

SHARDS = 10  # shards read
COLUMNS, SAMPLES = 6, 24  # of the contact sheet
THUMBNAIL = (220, 165)
LINE, LETTERS = 15, 34  # of the texts below an image: height of a line in pixels, letters per line
LINES = 3  # for one text; twice as many if an image has several
MARGIN = 8


@dataclass
class Findings:
    """The contents of a source.

    splits: size of each split, None if unknown. listed: (captions, questions) of all images, if known. skipped: counts
    by reason. broken: reasons by name; lost: number of broken samples. decoded: number of images tried, to which
    captions, questions and sizes belong. samples: (thumbnail, texts) by number, for the contact sheet.
    """

    name: str
    format: str
    splits: Mapping[str, int | None]
    listed: tuple[int, int] | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    lost: int = 0
    decoded: int = 0
    captions: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    samples: dict[int, tuple[Image.Image, list[str]]] = field(default_factory=dict)


def inspect(config: InspectConfig) -> list[Findings]:
    """Run `xformer data inspect`. Returns the printed findings of each source.

    Raises FileNotFoundError or ValueError as `find_source`.
    """
    found = find_source(config.source, config.images, allow_broken=True)
    sources = found.sources if isinstance(found, Mixture) else (found,)
    every = [examine(source, config.max_images, SAMPLES // len(sources) or 1) for source in sources]
    for findings in every:
        print("\n".join(_lines(findings)))
    samples = [sample for findings in every for _, sample in sorted(findings.samples.items())][:SAMPLES]
    if samples:
        config.sheet.absolute().parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(samples).save(config.sheet)
        print(f"sheet       {config.sheet}")
    return every


def examine(source: ListSource | ShardSource, images: int, samples: int) -> Findings:
    """Decode up to `images` records (0: all) and keep a random `samples` of them for the contact sheet."""
    records: Iterator[Record]
    if isinstance(source, ListSource):
        findings = Findings(source.name, source.format, {split: len(rows) for split, rows in source.rows.items()})
        captions, questions = (
            sum(sum(rows.counts[field]) for rows in source.rows.values()) for field in get_args(Field)
        )
        findings.listed, findings.skipped = (captions, questions), source.skipped
        findings.broken, findings.lost = dict(source.broken), len(source.broken)
        usable = list(source.usable())
        total = min(images or len(usable), len(usable))
        records = (rows[index] for rows, index in _evenly(usable, total))
    else:
        findings = Findings(source.name, source.format, {split: source.size(split) for split in source.shards})
        total = images or sum(size or 0 for size in findings.splits.values())
        records = _from_shards(source, images)
        if isinstance(source, TarShards):
            findings.broken |= dict.fromkeys(source.truncated(), "the shard is truncated or missing")
    rng = random.Random(0)
    for record in tqdm(records, total=total or None, unit="image", leave=False):
        findings.decoded += 1
        findings.captions += record.get("captions", ())
        findings.questions += [question["question"] for question in record.get("questions", ())]
        try:
            if "broken" in record:
                raise ValueError(record["broken"])
            image = load_image(open_image(record["image"], record["id"]))
        except (ValueError, OSError) as error:
            findings.broken[record["id"]] = str(error)
            findings.lost += record.get("lost", 1)
            continue
        findings.sizes.append(image.size)
        if len(findings.samples) >= samples:
            if rng.random() * findings.decoded >= samples:
                continue
            findings.samples.pop(rng.choice(list(findings.samples)))
        findings.samples[findings.decoded] = (ImageOps.contain(image, THUMBNAIL), _texts(record))
    return findings


def _evenly(items: Sequence, number: int) -> list:
    """Return `number` items, evenly spread."""
    return [items[count * len(items) // number] for count in range(number)]


def _from_shards(source: ShardSource, images: int) -> Iterator[Record]:
    """Yield the first records of evenly spread shards; all records if `images` is 0."""
    shards = [shard for of_split in source.shards.values() for shard in of_split]
    if not images:
        return chain.from_iterable(map(source.read, shards))
    chosen = _evenly(shards, min(SHARDS, len(shards)))
    each = -(-images // len(chosen))
    return islice(chain.from_iterable(islice(source.read(shard), each) for shard in chosen), images)


def _texts(record: Record) -> list[str]:
    """Return the first caption, and each question with its distinct answers."""
    asked = [f"{each['question']} {', '.join(dict.fromkeys(each['answers']))}" for each in record["questions"]]
    return record["captions"][:1] + asked


def _lines(findings: Findings) -> list[str]:
    known = [size for size in findings.splits.values() if size is not None]
    images = f"{sum(known):,}" if len(known) == len(findings.splits) else "unknown (no _stats.json)"
    if findings.listed:
        images += f", {findings.listed[0]:,} captions, {findings.listed[1]:,} questions"
    own = [f"{split} {'unknown' if size is None else f'{size:,}'}" for split, size in findings.splits.items() if split]
    lines = [
        f"source      {findings.name}",
        f"format      {findings.format}",
        f"images      {images}",
        f"splits      {', '.join(own) or 'none (some images are held out for validation by a hash of their name)'}",
    ]
    if skipped := [f"{count:,} {reason}" for reason, count in findings.skipped.items() if count]:
        lines.append(f"skipped     {', '.join(skipped)}")
    lines.append(f"decoded     {findings.decoded:,} images")
    if findings.sizes:
        widths, heights = zip(*findings.sizes, strict=True)
        lines.append(f"size        width {_spread(widths)}, height {_spread(heights)} (min, median, max)")
    for kind, texts in (("captions", findings.captions), ("questions", findings.questions)):
        if texts:
            each = len(texts) / max(1, findings.decoded)
            words = _spread([len(text.split()) for text in texts])
            lines.append(f"{kind:<11} {each:.1f} per image; words {words} (min, median, max)")
    lines.append(f"broken      {findings.lost:,}")
    named = [why if name in why else f"{name}: {why}" for name, why in findings.broken.items()]
    lines += [f"            {line}" for line in named[:MAX_NAMED]]
    if len(named) > MAX_NAMED:
        lines.append(f"            and {len(named) - MAX_NAMED:,} more")
    return lines


def _spread(values: Sequence[int]) -> str:
    return f"{min(values):,} / {statistics.median_low(values):,} / {max(values):,}"


def contact_sheet(samples: Sequence[tuple[Image.Image, list[str]]]) -> Image.Image:
    """Draw images in rows of six with their texts below. Letters missing in Pillow's font become boxes."""
    most = 2 * LINES if any(len(texts) > 1 for _, texts in samples) else LINES
    width, height = THUMBNAIL[0] + MARGIN, THUMBNAIL[1] + most * LINE + 2 * MARGIN
    rows = -(-len(samples) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(samples)) * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for index, (image, texts) in enumerate(samples):
        left, top = index % COLUMNS * width + MARGIN, index // COLUMNS * height + MARGIN
        thumbnail = ImageOps.contain(image, THUMBNAIL)
        sheet.paste(thumbnail, (left + (THUMBNAIL[0] - thumbnail.width) // 2, top + THUMBNAIL[1] - thumbnail.height))
        for number, line in enumerate(_wrapped(texts, most)):
            draw.text((left, top + THUMBNAIL[1] + 4 + number * LINE), line, "black", font)
    return sheet


def _wrapped(texts: Sequence[str], most: int) -> list[str]:
    """Wrap the texts to at most `most` lines; an ellipsis replaces the rest."""
    lines = [line for text in texts for line in textwrap.wrap(text, LETTERS)]
    if len(lines) <= most:
        return lines
    last = textwrap.shorten(f"{lines[most - 1]} {'…' * LETTERS}", LETTERS, placeholder=" …")  # too long by design
    return [*lines[: most - 1], last]
