"""What a conversion prints, and keeps beside the weights as conversion.json."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from xformer_mllm.convert.checks import Check
from xformer_mllm.convert.plan import Plan
from xformer_mllm.convert.target import Target, part_of


def summary(plan: Plan, target: Target) -> dict[str, list[dict]]:
    """As plain data: `parts` (what is made, from where) and `left` (what of the sources is not used)."""
    rows: dict[tuple[str, str, str], dict] = {}
    for name, tensor in target.wanted.items():
        part, dtype = part_of(name), str(tensor.dtype).removeprefix("torch.")
        origin = plan.copied[name].source.label if name in plan.copied else "initialised"
        empty = {"part": part, "from": origin, "tensors": 0, "parameters": 0, "dtype": dtype}
        row = rows.setdefault((part, origin, dtype), empty)
        row["tensors"] += 1
        row["parameters"] += tensor.numel()
    left = [
        {"source": label, "tensors": len(names), "why": reason, "first": names[0]}
        for (label, reason), names in plan.left.items()
    ]
    return {"parts": list(rows.values()), "left": left}


def show_summary(table: dict[str, list[dict]]) -> str:
    parts = table["parts"]
    total = ["total", "", sum(row["tensors"] for row in parts), sum(row["parameters"] for row in parts), ""]
    rows = [*(list(row.values()) for row in parts), total]
    text = _columns(("part", "from", "tensors", "parameters", "dtype"), rows)
    if table["left"]:
        rows = [list(row.values()) for row in table["left"]]
        text += "\n\n" + _columns(("left over in", "tensors", "why", "the first of them"), rows)
    return text


def show_checks(checks: Sequence[Check]) -> str:
    rows = [[c.what, c.against, f"{c.difference:.1e}", f"{c.tolerance:.0e}"] for c in checks]
    return _columns(("on a test image", "against", "largest difference", "allowed"), rows)


def _columns(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as text; numbers to the right."""
    shown = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    aligned = []
    for title, *cells in zip(head, *shown, strict=True):
        width, number = max(map(len, (title, *cells))), all(cell[:1].isdigit() for cell in cells)
        aligned.append([cell.rjust(width) if number else cell.ljust(width) for cell in (title, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def record(target: Target, table: dict[str, list[dict]], checks: Sequence[Check]) -> dict[str, Any]:
    """How the weights came to be, as data."""
    settings = {name: value for name, value in asdict(target.settings).items() if name != "output_dir"}
    folders = {source.label: source.folder for source in target.sources.all() if source.folder}
    revisions = {label: path.name for label, path in folders.items() if path.parent.name == "snapshots"}  # hub's cache
    return {"settings": settings, "revisions": revisions, **table, "checks": [asdict(check) for check in checks]}
