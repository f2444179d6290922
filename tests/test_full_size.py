"""benchmarks/full_size.py and gpu.py, which measure models of the paper's sizes with random weights; mostly tiny here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FEW = ("--tiny", "--stage1-batch", "3", "--stage2-batch", "3", "--rounds", "1", "--warm-up", "1")


def script(name: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / name), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(*flags: str) -> dict:
    """What full_size.py found. Skips where it says that there is too little memory."""
    done = script("full_size.py", "--json", *flags)
    if done.returncode and "free memory" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_trained_and_generated(results: dict) -> None:
    stage1, stage2 = results["stage1"], results["stage2"]
    assert set(stage1["losses"]) == {"loss", "itc_loss", "itm_loss", "itg_loss", "reconstruction_loss"}
    assert set(stage2["losses"]) == {"loss", "lm_loss"}
    for result in (stage1, stage2):
        assert all(map(math.isfinite, result["losses"].values()))
        # Behind output projections that start at zero; everything else has a gradient in the very first step.
        assert all(".fusion.blocks." in name for name in result["missed"])
        assert result["reached"] > 2 * len(result["missed"])
        assert result["counted_bytes"] < result["peak_bytes"]
    assert stage2["generated"] == [2, 10]  # new tokens


def test_embedded_sizes(tmp_path):
    page = tmp_path / "page.md"
    assert_trained_and_generated(run("--tiny", "--output", str(page)))
    assert "| peak memory, GB |" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_paper_sizes_fit_in_15_gb():
    """Needs 15 GB of free memory and some minutes; run it alone."""
    results = run()
    assert_trained_and_generated(results)
    assert results["stage2"]["losses"]["lm_loss"] == pytest.approx(math.log(50272), rel=0.1)  # chance
    assert max(result["peak_bytes"] for result in results.values()) < 15e9


def assert_gpu_page(page: str, compiled: tuple[str, ...]) -> None:
    """A row for each stage, variant and setting, with times above 0; ratios of the baseline to itself are 1."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line[:3] in ("| 1", "| 2")
    ]
    assert [tuple(row[:3]) for row in rows] == [
        (stage, variant, setting) for setting in compiled for stage in "12" for variant in ("qformer", "xformer")
    ]
    assert all(float(row[3]) > 0 for row in rows)
    assert all(row[4] == "1.000" for row in rows if row[1] == "qformer")
    assert "the paper: 680 and 890 ms, × 1.31" in page


def test_gpu_script_on_embedded_sizes(tmp_path):
    done = script("gpu.py", *FEW, "--no-compile", "--output", str(tmp_path / "page.md"))
    assert done.returncode == 0, done.stderr
    assert_gpu_page((tmp_path / "page.md").read_text(encoding="utf-8"), ("off",))


@pytest.mark.slow
def test_gpu_script_with_torch_compile():
    done = script("gpu.py", *FEW)
    assert done.returncode == 0, done.stderr
    assert_gpu_page(done.stdout, ("off", "on"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_says_that_there_is_no_gpu():
    done = script("gpu.py")
    assert done.returncode == 1
    assert done.stderr.strip() == "gpu.py: no GPU here; --tiny tries the script out on a CPU"
