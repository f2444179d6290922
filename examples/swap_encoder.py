"""X-Former as a part of your own model: another vision tower beside CLIP, images in, Z' out.

    python examples/swap_encoder.py

The towers are small and random here; `from_pretrained` of your own goes in their place.
"""

import torch
from transformers import Blip2QFormerConfig, CLIPVisionConfig, Dinov2Config

from xformer_mllm import XFormerConfig, XFormerModel
from xformer_mllm.variants import variant_config

config = XFormerConfig(
    clip_config=CLIPVisionConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=64, patch_size=16
    ),
    clip_feature_layer=-2,
    mae_config=Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8
    ),  # any tower of transformers: MAE, DINOv2, DINOv3, SigLIP 2, a second CLIP
    qformer_config=Blip2QFormerConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, encoder_hidden_size=64
    ),
    num_query_tokens=8,
    fusion="dual_cross_attention",
    reconstruction=False,
)
images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)

model = XFormerModel(config)
model.freeze()
output = model(images)
print(
    "C", tuple(output.clip_tokens.shape), "M", tuple(output.mae_tokens.shape), "Z'", tuple(output.fused_queries.shape)
)
print("Z' = Z_q before training:", torch.equal(output.fused_queries, output.queries))

baseline = XFormerModel(variant_config("qformer", config))
baseline.freeze()
for name, one in (("xformer", model), ("qformer", baseline)):
    print(f"{name}: {sum(p.numel() for p in one.parameters() if p.requires_grad):,} trained parameters")
