"""The result of `estimate` as text."""

from typing import Any

from xformer_mllm.estimate.costs import Cost, total
from xformer_mllm.report.wording import aligned


def show(result: dict[str, Any]) -> str:
    """Format the result of `estimate` as tables."""
    work, gpu, assumed, run, step = (result[name] for name in ("work", "gpu", "assumed", "run", "step"))
    tokens = {"CLIP" if name == "clip" else name: n for name, n in result["tokens_per_image"].items()}
    blocks = [
        f"{result['recipe']}: {result['variant']}, stage {work['stage']}, on {work['gpus']} x {gpu['name']}, "
        f"{work['images']} images each",
        _parameter_table(result["parameters"]),
        _part_table(result["per_image"]),
        _lines(
            {
                "tokens per image": ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in tokens.items()),
                "step": f"{step['images']:,} images, {step['flops_per_gpu'] / 1e12:,.1f} TFLOP per GPU, "
                f"{step['seconds']:.2f} s: {step['images_per_second']:,.0f} images/s",
                "run": f"{run['steps']:,} steps, {run['images']:,} images ({run['epochs']:.2f} epochs), at most "
                f"{run['text_tokens'] / 1e9:.2f} G text tokens",
                "time": f"{run['hours']:.1f} hours, {run['gpu_hours']:,.0f} GPU-hours, if matrix products reach "
                f"{100 * assumed['utilisation']:.0f} % of {gpu['flops'] / 1e12:.0f} TFLOP/s",
            }
        ),
        _memory_table(result),
    ]
    if "variants" in result:
        blocks.append(_variant_table(result["variants"]))
    return "\n\n".join(blocks)


def _parameter_table(parameters: dict[str, list[int]]) -> str:
    rows = [[name, f"{number:,}", f"{trained:,}"] for name, (number, trained) in parameters.items()]
    sums = [f"{sum(column):,}" for column in zip(*parameters.values(), strict=True)]
    return "\n".join(aligned([["part", "parameters", "trained"], *rows, ["total", *sums]]))


def _part_table(per_image: dict[str, dict[str, int]]) -> str:
    parts = {name: Cost(**cost) for name, cost in per_image.items()}
    parts["total"] = total(parts.values())
    rows = [
        [name, f"{cost.forward / 1e9:.1f}", f"{cost.backward / 1e9:.1f}", f"{cost.kept / 1e6:.1f}"]
        for name, cost in parts.items()
    ]
    return "\n".join(aligned([["per image", "GFLOP forward", "GFLOP backward", "MB kept"], *rows]))


def _memory_table(result: dict[str, Any]) -> str:
    held = dict(result["memory"])
    needed, largest = held.pop("needed"), held.pop("largest_batch_size")
    held[f"reserve (assumed, {100 * result['assumed']['reserve']:.0f} %)"] = held.pop("reserve")
    rows = [[name, f"{number / 1e9:.2f}"] for name, number in held.items() if number]
    room = result["gpu"]["memory"]
    verdict = "fits" if needed <= room else "does NOT fit"
    table = aligned([["memory per GPU", "GB"], *rows, ["total", f"{needed / 1e9:.2f}"]])
    return "\n".join([*table, f"{verdict} in {room / 1e9:.0f} GB; the largest batch_size that does: {largest}"])


def _variant_table(variants: dict[str, Any]) -> str:
    base = variants["qformer"]
    rows = []
    for name, row in variants.items():
        cells = [f"{row['trained'] / 1e6:.1f}"]
        for key, unit in (("flops_per_image", 1e9), ("seconds", 1), ("memory", 1e9)):
            cells += [f"{row[key] / unit:,.2f}", f"{row[key] / base[key]:.3f}"]
        rows.append([name, *cells])
    head = ["variant", "M trained", "GFLOP per image", "ratio", "s per pass", "ratio", "GB per GPU", "ratio"]
    return "\n".join(aligned([head, *rows]))


def _lines(named: dict[str, str]) -> str:
    width = max(map(len, named))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in named.items())
