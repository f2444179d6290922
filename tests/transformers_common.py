"""transformers' own common tests on our models, configuration and processor: `make test-transformers`.

They come with transformers' source distribution, which the make target downloads to .cache/transformers-tests. Some of
their imports are left out there; they are replaced here: the generation tests by those in test_generation.py, which
follow their list of cases. A skipped test is skipped in transformers' tests of BLIP-2 too; the reason is beside it.
"""

import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from xformer_mllm import (
    XFormerConfig,
    XFormerForConditionalGeneration,
    XFormerForImageTextRetrieval,
    XFormerForPreTraining,
    XFormerModel,
)

SOURCE = Path(__file__).parents[1] / ".cache" / "transformers-tests"
if not SOURCE.is_dir():
    pytest.exit("transformers' tests are not here; run: make test-transformers", returncode=2)


def stand_in(name: str, **contents) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


class NoExportTests:
    """In place of a mixin that the source distribution lacks."""


class NoGenerationTests:
    """In place of another."""


for package in ("tests", "tests.exporters", "tests.generation", "tests.utils"):
    stand_in(package, __path__=[str(SOURCE / package.replace(".", "/"))])
stand_in("tests.exporters.test_export", ExportTesterMixin=NoExportTests)
stand_in("tests.generation.test_utils", GenerationTesterMixin=NoGenerationTests)
stand_in(
    "tests.utils.test_configuration_utils",
    config_common_kwargs={
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["BertModel"],
        "id2label": {0: "label"},
        "label2id": {"label": "0"},
        "problem_type": "regression",
    },
)
stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)

from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402

BATCH = 7  # the tests fill up to it with tokens that are no placeholders
LENGTH = 7
PATCHES = 16


class ModelTester:
    """What the common tests ask a model's tester for."""

    batch_size = BATCH
    image_size, patch_size = 32, 8
    num_hidden_layers = 2

    def __init__(self, stage: int, is_training: bool):
        self.stage = stage
        self.is_training = is_training
        self.seq_length = LENGTH if stage else self.get_config().num_query_tokens

    def get_config(self) -> XFormerConfig:
        return tiny_config(reconstruction=self.stage == 1)

    def prepare_config_and_inputs_for_common(self) -> tuple[XFormerConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        inputs = {"pixel_values": floats_tensor([BATCH, 3, 32, 32])}
        text = ids_tensor([BATCH, LENGTH], 40).clamp(5)
        if self.stage == 1:
            inputs |= {"qformer_input_ids": text, "qformer_attention_mask": torch.ones_like(text)}
        if self.stage == 2:
            image = torch.full((BATCH, config.num_query_tokens), config.image_token_index)
            ids = torch.cat([image, text], dim=1)
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return config, inputs


class Common(ModelTesterMixin):
    stage = 0
    is_training = False
    _is_composite = True
    test_all_params_have_gradient = False  # CLIP's last norm and, in stage 2, the Q-Former's text layers are not used
    test_resize_embeddings = False  # BLIP-2's too: there are two vocabularies (test_conventions.py resizes both)

    def setUp(self):
        self.model_tester = ModelTester(self.stage, self.is_training)
        names = ["image_token_index", "num_query_tokens", "image_text_hidden_size"]
        self.config_tester = ConfigTester(
            self, config_class=XFormerConfig, has_text_modality=False, common_properties=names
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    @property
    def additional_model_inputs(self):
        return list(self.model_tester.prepare_config_and_inputs_for_common()[1])[1:]

    @unittest.skip("BLIP-2's too: attentions are tested by part (test_modeling.py, test_conventions.py)")
    def test_attention_outputs(self):
        pass

    @unittest.skip("BLIP-2's too: hidden states are tested by part (test_conventions.py)")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("BLIP-2's too: gradients of hidden states are tested by part")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class XFormerModelTest(Common, unittest.TestCase):
    all_model_classes = (XFormerModel,)


class XFormerForImageTextRetrievalTest(Common, unittest.TestCase):
    stage = 1
    all_model_classes = (XFormerForImageTextRetrieval,)


class XFormerForPreTrainingTest(Common, unittest.TestCase):
    stage = 1
    is_training = True
    all_model_classes = (XFormerForPreTraining,)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """The masked patches and the hard negatives are drawn otherwise, anew in each forward."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        batch = len(inputs["pixel_values"])
        others = torch.arange(batch).roll(1)
        noise = torch.rand(batch, PATCHES, generator=torch.Generator().manual_seed(0))
        return inputs | {"noise": noise, "negatives": (others, others)}

    @unittest.skip("losses are those of a batch; BLIP-2 has no model of stage 1 in transformers")
    def test_batching_equivalence(self):
        pass


class XFormerForConditionalGenerationTest(Common, NoGenerationTests, unittest.TestCase):
    stage = 2
    is_training = True
    all_model_classes = (XFormerForConditionalGeneration,)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | {"labels": inputs["input_ids"].clone()} if return_labels else inputs


del Common, ModelTesterMixin, NoExportTests, NoGenerationTests
