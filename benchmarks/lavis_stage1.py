"""LAVIS's stage-1 step (salesforce-lavis 1.0.2), for `peers.py`, which starts this in the peers' environment.

LAVIS's own `Blip2Qformer` and its own forward. Replaced are the tokenizer and BERT's configuration, which it would
download, the vision encoder, whose output is this benchmark's input, and the packages that it imports for other models.

    python lavis_stage1.py SIZES.json    # then one JSON request per line of standard input, as `peers.py` writes them
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import time
import types
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import distributed, nn

UNUSED = ("PIL", "decord", "fairscale", "iopath", "omegaconf", "pandas", "timm", "torchvision", "yaml")


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that LAVIS imports and that its stage 1 needs none of."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in UNUSED else None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module):
        pass


def stage1_module():
    """LAVIS's module of stage 1, without the `__init__` files that import every other model."""
    sys.meta_path.insert(0, Stubs())
    root = Path(importlib.util.find_spec("lavis").submodule_search_locations[0])
    for name in ("lavis", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    sys.modules["lavis.models"].BaseModel = importlib.import_module("lavis.models.base_model").BaseModel
    return importlib.import_module("lavis.models.blip2_models.blip2_qformer")


def build(sizes: dict, device: str) -> nn.Module:
    """LAVIS's model of these sizes, on image features instead of pixels."""
    lavis = stage1_module()
    from lavis.models.blip2_models.blip2 import LayerNorm
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
    from transformers import BertTokenizer

    class FeaturesIn(lavis.Blip2Qformer):
        @classmethod
        def init_tokenizer(cls):
            tokenizer = BertTokenizer(sizes["vocabulary_file"])
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})
            return tokenizer

        def init_vision_encoder(self, *_):
            encoder = nn.Identity()
            encoder.num_features = sizes["image_width"]
            return encoder, LayerNorm(sizes["image_width"])

        @classmethod
        def init_Qformer(cls, num_query_token, vision_width, cross_attention_freq=2):  # noqa: N802
            config = BertConfig(
                vocab_size=sizes["vocabulary"] - 1,
                hidden_size=sizes["width"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                intermediate_size=4 * sizes["width"],
                hidden_dropout_prob=sizes["dropout"],
                attention_probs_dropout_prob=sizes["dropout"],
            )
            config.encoder_width, config.add_cross_attention = vision_width, True
            config.cross_attention_freq, config.query_length = cross_attention_freq, num_query_token
            queries = nn.Parameter(torch.zeros(1, num_query_token, config.hidden_size).normal_(std=0.02))
            return BertLMHeadModel(config), queries

    return FeaturesIn(num_query_token=sizes["queries"], max_txt_len=sizes["max_tokens"]).to(device)


def main() -> None:
    warnings.filterwarnings("ignore")
    sizes = json.loads(Path(sys.argv[1]).read_text())
    device = sizes["device"]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.group", rank=0, world_size=1)
    model = build(sizes, device)
    torch.save(model.state_dict(), sizes["weights"])
    features = torch.load(sizes["features"]).to(device)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if "oneDNN" in request["precision"] else "none"
        model.train(request["train"])
        model.zero_grad()
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=request["precision"] == "bf16"):
            output = model({"image": features, "text_input": request["texts"]})
        if request["train"]:
            output.loss.backward()
        itc, itg = output.loss_itc.item(), output.loss_lm.item()  # waits for a GPU
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "itc": itc, "itg": itg}), flush=True)


if __name__ == "__main__":
    main()
