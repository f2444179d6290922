"""How fp32 matrices are multiplied on a CPU."""

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
