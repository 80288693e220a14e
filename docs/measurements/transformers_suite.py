"""transformers' own common tests on our classes, in both presets, and on Llama as the control.

`run_transformers_suite.py` copies this file into the `tests` package of a checkout of transformers, where its relative
imports resolve. Our own pytest does not collect it.
"""

import tempfile
import unittest
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, LlamaModel

import hfllm
from hfllm.model import PRESETS

from ... import test_fsdp_mixin, test_modeling_common, test_pipeline_mixin, test_tensor_parallel_mixin
from ...causal_lm_tester import CausalLMModelTest, CausalLMModelTester


torch.set_num_threads(1)

MODEL_TYPE = hfllm.GPTConfig.model_type

# The suite looks up in tables of transformers' own models which class has which head, and which model types may start
# processes.
for table, name in (
    ("MODEL_MAPPING_NAMES", "GPTModel"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "GPTForCausalLM"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "GPTForSequenceClassification"),
):
    setattr(test_modeling_common, table, {**getattr(test_modeling_common, table), MODEL_TYPE: name})
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES |= {MODEL_TYPE, "llama"}
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES.add(MODEL_TYPE)


class ModernTester(CausalLMModelTester):
    base_model_class = hfllm.GPTModel
    config_class = hfllm.GPTConfig
    causal_lm_class = hfllm.GPTForCausalLM
    sequence_classification_class = hfllm.GPTForSequenceClassification
    preset = "modern"

    def __init__(self, parent, **kwargs):
        super().__init__(parent, **kwargs)
        # Keep what the tester sets itself: sizes, the activation, no dropout, an untied head.
        for name, value in PRESETS[self.preset].items():
            if not hasattr(self, name) and not name.endswith("dropout"):
                setattr(self, name, value)


class BookTester(ModernTester):
    preset = "book"


class LlamaTester(CausalLMModelTester):
    base_model_class = LlamaModel


@cache
def train_tokenizer():
    return hfllm.train_bpe([path.read_text() for path in Path(hfllm.__file__).parent.glob("*.py")], 512)


class CommonTest(CausalLMModelTest):
    """Shared by the three classes. The pipeline tests, which download tiny models, get tiny models made here."""

    model_split_percents = [0.5, 0.7, 0.8]
    # Skipped otherwise: Llama is too old, and our files carry no year.
    test_can_init_all_missing_weights_before_2023 = True

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tiny_models = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.tiny_models.cleanup)
        tokenizer = train_tokenizer()
        tester = cls.model_tester_class
        tester._verify_and_infer_model_attributes()
        for model_class in (
            tester.base_model_class,
            tester.causal_lm_class,
            tester.sequence_classification_class,
            tester.token_classification_class,
            tester.question_answering_class,
        ):
            if model_class is not None:
                folder = Path(cls.tiny_models.name, model_class.config_class.model_type, model_class.__name__)
                config = tester(None).get_config()
                config.vocab_size = len(tokenizer)
                config.max_position_embeddings = 2048  # one of the texts has 800 tokens
                for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                    setattr(config, name, getattr(tokenizer, name))
                model_class(config).save_pretrained(folder)
                tokenizer.save_pretrained(folder)

    def setUp(self):
        super().setUp()
        test_pipeline_mixin.TRANSFORMERS_TINY_MODEL_PATH = self.tiny_models.name
        test_pipeline_mixin.tiny_model_summary = {
            model_class.__name__: {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
            for model_class in self.all_model_classes
        }


class ModernTest(CommonTest, unittest.TestCase):
    model_tester_class = ModernTester
    _torch_compile_train_cls = hfllm.GPTForCausalLM


class BookTest(CommonTest, unittest.TestCase):
    model_tester_class = BookTester
    _torch_compile_train_cls = hfllm.GPTForCausalLM


# Each test about rotary positions starts from a config that has them.
for name in dir(BookTest):
    if name.startswith("test_model_rope_") and callable(method := getattr(BookTest, name)):
        setattr(BookTest, name, unittest.skip("Learned positions are not rotary")(method))


class LlamaTest(CommonTest, unittest.TestCase):
    model_tester_class = LlamaTester
    _torch_compile_train_cls = LlamaForCausalLM


# pytest would collect the imported base class as well.
del CausalLMModelTest, CommonTest
