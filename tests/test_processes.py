"""What a process decides for all of its work: how a CPU multiplies, what becomes of freed memory, who loads data."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from xformer_mllm import processes


@pytest.fixture
def products():
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "none"
    yield setting
    setting.fp32_precision = before


def test_products_stay_exact(products):
    processes.multiply_fp32_by_onednn()
    a, b = torch.randn(300, 500), torch.randn(500, 200)
    error = ((a @ b).double() - a.double() @ b.double()).abs().max()
    assert error < 1e-5 * 500**0.5  # bf16's is 100 times as large
    assert error < 0.01 * ((a.bfloat16() @ b.bfloat16()).double() - a.double() @ b.double()).abs().max()


def test_a_cpu_that_rounds_keeps_its_setting(products, monkeypatch):
    """As one with AMX: the product of matrices rounded to bf16."""
    multiply = torch.Tensor.__matmul__

    def rounded(a, b):
        rounds = a.dtype == torch.float32 and products.fp32_precision == "bf16"
        return multiply(a.bfloat16().float(), b.bfloat16().float()) if rounds else multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    processes.multiply_fp32_by_onednn()
    assert products.fp32_precision == "none"


FAULTS = """
import resource, torch
from xformer_mllm import processes
processes.keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**22) for _ in range(8)]  # 16 MB each
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("device", "cores", "expected"), [("cpu", 8, 0), ("cuda", 8, 4), ("cuda", 2, 2)])
def test_data_is_loaded_beside_a_gpu(device, cores, expected, monkeypatch):
    monkeypatch.setattr(processes, "PartialState", lambda: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(processes, "cores", lambda: cores)
    assert processes.loaders(None) == expected
    assert processes.loaders(0) == 0
    assert processes.loaders(7) == 7


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_freed_memory_is_used_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert second < first / 4  # by default they are equal


def test_elsewhere_nothing_is_set(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", None)
    processes.keep_freed_memory()
