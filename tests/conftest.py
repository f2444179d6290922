"""What the tests share: tiny random models of every kind, on one thread, with fixed seeds."""

import os

# Before torch: two threads of one process collapse when anything else runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    OPTConfig,
    SiglipVisionConfig,
    ViTMAEConfig,
)

from xformer_mllm import XFormerConfig
from xformer_mllm.checkpoints import start_generation
from xformer_mllm.embedded.start import start_pretraining

torch.set_num_threads(1)

VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
TOWERS = {
    "blip2": lambda: Blip2VisionConfig(**VISION, image_size=32, patch_size=8, initializer_range=0.05),
    "clip": lambda: CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
    "siglip": lambda: SiglipVisionConfig(**VISION, image_size=32, patch_size=8),
}


def tiny_config(tower: str = "clip", **changes) -> XFormerConfig:
    """X-Former with every part a few thousand weights small, and no two widths equal that could be confused."""
    fields = {
        "clip_config": TOWERS[tower](),
        "mae_config": ViTMAEConfig(
            hidden_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
            decoder_hidden_size=24,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=48,
        ),
        "qformer_config": Blip2QFormerConfig(
            vocab_size=50,
            hidden_size=28,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=44,
            encoder_hidden_size=32,
            max_position_embeddings=40,
            use_qformer_text_input=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "text_config": OPTConfig(
            vocab_size=60,
            hidden_size=36,
            word_embed_proj_dim=36,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        ),
        "num_query_tokens": 4,
        "image_text_hidden_size": 16,
        "text_start_token_id": 49,
        "image_token_index": 59,
    }
    return XFormerConfig(**(fields | changes))


def randomise(module: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Noise on every parameter, so that nothing is equal because it is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # a test that trains has changed it


@pytest.fixture
def images() -> torch.Tensor:
    """uint8[4, 3, 32, 32]."""
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [4, 7] of different lengths, [CLS]-like first token, all different."""
    ids = torch.randint(5, 40, (4, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[3, 3:] = 0
    ids[mask == 0] = 0
    return ids, mask


def llm_inputs(config: XFormerConfig, batch: int, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Placeholders and random text ids, and their mask, int64[batch, Q+length]."""
    text = torch.randint(5, 40, (batch, length))
    ids = torch.cat([torch.full((batch, config.num_query_tokens), config.image_token_index), text], dim=1)
    return ids, torch.ones_like(ids)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Run folders stage1, stage2 and qformer (stage 1, no second encoder); the shipped encoders, the rest random."""
    folder = tmp_path_factory.mktemp("runs")

    def save(parts, name):
        for part in parts:
            part.save_pretrained(folder / name / "model")

    model, processor = start_pretraining("xformer", seed=0)
    with torch.no_grad():  # a fusion that does something: fresh, M' is M
        for parameter in model.xformer.fusion.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    save((model, processor), "stage1")
    save(start_generation(folder / "stage1" / "model"), "stage2")
    save(start_pretraining("qformer", seed=0), "qformer")
    return folder
