"""`xformer data inspect`: what a source of images holds, what is broken in it, and a contact sheet."""

import random
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

from xformer_mllm.data.formats import ListSource
from xformer_mllm.data.records import MAX_NAMED, Record, open_image
from xformer_mllm.data.shards import ShardSource, TarShards
from xformer_mllm.data.sources import Mixture, find_source
from xformer_mllm.model.images import load_image

SHARDS = 10  # that are looked into
COLUMNS, SAMPLES = 6, 24  # of the contact sheet
THUMBNAIL = (220, 165)
LINE, LINES, LETTERS = 15, 3, 34  # of a caption: pixels high, lines, letters in each
MARGIN = 8


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What a source of images holds, what is broken in it, and a contact sheet."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder, FILE.json, FILE.jsonl, shards (a folder of .tar, one, or a pattern) or hf:NAME; see docs/data.md."""
    images: Path | None = None
    """The folder of the images that a list names, or of a mixture's sources, if it is not the file's own."""
    sheet: Path = Path("contact-sheet.png")
    """Where the contact sheet goes."""
    max_images: int = 1000
    """Decode at most so many images, spread evenly (of shards: the first ones of ten shards); 0 for all."""

    def __post_init__(self) -> None:
        """Raises ValueError, in one line, for a number that cannot be."""
        if self.max_images < 0:
            raise ValueError(f"max_images must not be negative, but is {self.max_images}")


@dataclass
class Findings:
    """What was found out about a source.

    splits: how many images each has, as the source says; None where it does not. skipped, broken: by name and why; lost:
    how many samples were broken. texts: of the images looked at. listed: (captions, questions) of all, where known.
    """

    name: str
    format: str
    splits: Mapping[str, int | None]
    listed: tuple[int, int] | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    looked_at: int = 0
    captions: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    lost: int = 0
    samples: dict[int, tuple[Image.Image, str]] = field(default_factory=dict)


def inspect(config: InspectConfig) -> list[Findings]:
    """Run `xformer data inspect`. Returns what it printed, for each source.

    Raises FileNotFoundError or ValueError as `find_source`.
    """
    found = find_source(config.source, config.images, allow_broken=True)
    sources = found.sources if isinstance(found, Mixture) else (found,)
    every = [look(source, config.max_images, SAMPLES // len(sources) or 1) for source in sources]
    for findings in every:
        print("\n".join(_lines(findings)))
    samples = [sample for findings in every for _, sample in sorted(findings.samples.items())][:SAMPLES]
    if samples:
        config.sheet.absolute().parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(samples).save(config.sheet)
        print(f"sheet       {config.sheet}")
    return every


def look(source: ListSource | ShardSource, images: int, samples: int) -> Findings:
    """Look at up to `images` records (0: all) and keep `samples` of them for the contact sheet, drawn at random."""
    if isinstance(source, ListSource):
        findings = Findings(source.name, source.format, {split: len(rows) for split, rows in source.rows.items()})
        counts = [[rows.counts(kind) for rows in source.rows.values()] for kind in ("captions", "questions")]
        findings.listed = (sum(map(sum, counts[0])), sum(map(sum, counts[1])))
        findings.skipped = source.skipped
        findings.broken, findings.lost = dict(source.broken), len(source.broken)
        records, total = _from_rows(source, images)
    else:
        findings = Findings(source.name, source.format, {split: source.size(split) for split in source.shards})
        records, total = (
            _from_shards(source, images),
            images or sum(size or 0 for size in findings.splits.values()),
        )
        if isinstance(source, TarShards):
            findings.broken |= dict.fromkeys(source.cut_short(), "the shard is cut short or missing")
    rng = random.Random(0)
    for record in tqdm(records, total=total or None, unit="image", leave=False):
        findings.looked_at += 1
        image = _note(findings, record)
        if image is None:
            continue
        if len(findings.samples) >= samples:
            if rng.random() * findings.looked_at >= samples:
                continue
            findings.samples.pop(rng.choice(list(findings.samples)))
        findings.samples[findings.looked_at] = (ImageOps.contain(image, THUMBNAIL), _text(record))
    return findings


def _from_rows(source: ListSource, images: int) -> tuple[Iterator[Record], int]:
    """Records spread evenly over the splits, and their number; rows without a text are known to be broken already."""
    places = [
        (rows, place)
        for rows in source.rows.values()
        for place, texts in enumerate(zip(rows.counts("captions"), rows.counts("questions"), strict=True))
        if any(texts)
    ]
    number = min(images or len(places), len(places))
    chosen = [places[count * len(places) // number] for count in range(number)]
    return (rows[place] for rows, place in chosen), number


def _from_shards(source: ShardSource, images: int) -> Iterator[Record]:
    """The first records of shards that are spread evenly; all records of all shards if `images` is 0."""
    shards = [shard for of_split in source.shards.values() for shard in of_split]
    if not images:
        return chain.from_iterable(source.read(shard) for shard in shards)
    number = min(SHARDS, len(shards))
    chosen = [shards[count * len(shards) // number] for count in range(number)]
    return islice(chain.from_iterable(islice(source.read(shard), -(-images // number)) for shard in chosen), images)


def _note(findings: Findings, record: Record) -> Image.Image | None:
    """Note what a record holds; returns its image."""
    if "broken" in record:
        findings.broken[record["id"]] = record["broken"]
        findings.lost += record["lost"]
        return None
    findings.captions += record["captions"]
    findings.questions += [question["question"] for question in record["questions"]]
    try:
        image = load_image(open_image(record["image"], record["id"]))
    except (ValueError, OSError) as error:
        findings.broken[record["id"]] = str(error)
        findings.lost += 1
        return None
    findings.sizes.append(image.size)
    return image


def _text(record: Record) -> str:
    if record["captions"]:
        return record["captions"][0]
    question = record["questions"][0]
    return f"{question['question']} {question['answers'][0]}"


# ------------------------------------------------------------------------------------------------------------ in words


def _lines(findings: Findings) -> list[str]:
    known = [size for size in findings.splits.values() if size is not None]
    images = f"{sum(known):,}" if len(known) == len(findings.splits) else "unknown (no _stats.json says)"
    if findings.listed:
        images += f", {findings.listed[0]:,} captions, {findings.listed[1]:,} questions"
    own = [f"{split} {'unknown' if size is None else f'{size:,}'}" for split, size in findings.splits.items() if split]
    lines = [
        f"source      {findings.name}",
        f"format      {findings.format}",
        f"images    {images}",
        f"splits      {', '.join(own) or 'none of its own (some are kept for validation by the hash of their names)'}",
    ]
    if skipped := [f"{count:,} {reason}" for reason, count in findings.skipped.items() if count]:
        lines.append(f"left out    {', '.join(skipped)}")
    lines.append(f"looked at   {findings.looked_at:,} images")
    if findings.sizes:
        widths, heights = zip(*findings.sizes, strict=True)
        lines.append(f"size        width {_spread(widths)}, height {_spread(heights)} (smallest, median, largest)")
    for kind, texts in (("captions", findings.captions), ("questions", findings.questions)):
        if texts:
            each = len(texts) / max(1, findings.looked_at)
            words = _spread([len(text.split()) for text in texts])
            lines.append(f"{kind:<11} {each:.1f} an image; words {words} (fewest, median, most)")
    lines.append(f"broken      {findings.lost:,}")
    named = [why if name in why else f"{name}: {why}" for name, why in findings.broken.items()]
    lines += [f"            {line}" for line in named[:MAX_NAMED]]
    if len(named) > MAX_NAMED:
        lines.append(f"            and {len(named) - MAX_NAMED:,} more")
    return lines


def _spread(values: Sequence[int]) -> str:
    return f"{min(values):,} / {statistics.median_low(values):,} / {max(values):,}"


# ------------------------------------------------------------------------------------------------------- contact sheet


def contact_sheet(samples: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Images in rows of six, each with its caption below. A letter that Pillow's own font lacks is a box."""
    width, height = THUMBNAIL[0] + MARGIN, THUMBNAIL[1] + LINES * LINE + 2 * MARGIN
    rows = -(-len(samples) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(samples)) * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for place, (image, text) in enumerate(samples):
        left, top = place % COLUMNS * width + MARGIN, place // COLUMNS * height + MARGIN
        thumbnail = ImageOps.contain(image, THUMBNAIL)
        sheet.paste(thumbnail, (left + (THUMBNAIL[0] - thumbnail.width) // 2, top + THUMBNAIL[1] - thumbnail.height))
        shown = textwrap.wrap(text, LETTERS, max_lines=LINES, placeholder=" …")
        for number, line in enumerate(shown):
            draw.text((left, top + THUMBNAIL[1] + 4 + number * LINE), line, "black", font)
    return sheet
