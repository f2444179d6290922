"""What a process sets for all of its work: how a CPU multiplies fp32 matrices, and what becomes of freed memory."""

import resource
import sys

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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept_on_glibc_alone(monkeypatch):
    """A block below the threshold, freed, is still the process's; elsewhere nothing is called."""
    processes.keep_freed_memory()
    block = torch.ones(2**22)  # 16 MB
    del block
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**22)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # of 4,096 pages
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", None)
    processes.keep_freed_memory()
