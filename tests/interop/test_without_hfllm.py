"""Other libraries without hfllm installed: the folder's own code is enough, with `trust_remote_code`."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.interop.conftest import token_log_probs


pytestmark = pytest.mark.slow

TEXT = "hello, this is one text"


def run_without_hfllm(code: str, folder: str, tmp_path) -> dict:
    """Run code in a process that cannot import hfllm; it fills a dict `found`, which comes back."""
    beginning = f"""
        import json, sys
        sys.modules["hfllm"] = None  # importing it fails, installed or not
        folder, out, text, found = {folder!r}, {str(tmp_path / "out")!r}, {TEXT!r}, {{}}
        import torch
        torch.set_num_threads(1)
    """
    end = "\nprint('found:' + json.dumps(found))"
    script = textwrap.dedent(beginning) + textwrap.dedent(code) + end
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("found:")[-1])


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path, monkeypatch):
    """Remote code is copied into a cache, which must be neither the user's nor another test's."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_trl_tunes_it_and_what_it_saves_carries_the_code_on(folder, tmp_path):
    pytest.importorskip("trl")
    found = run_without_hfllm(
        """
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
        arguments = SFTConfig(out, use_cpu=True, bf16=False, report_to="none", max_steps=3, learning_rate=1e-2,
                              logging_steps=1, save_strategy="no", packing=True, max_length=64, trust_remote_code=True)
        trainer = SFTTrainer(folder, args=arguments, train_dataset=Dataset.from_dict({"text": [text] * 4}))
        trainer.train()
        trainer.save_model()
        found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        found["class"] = type(model).__name__
        found["same"] = bool(torch.equal(model.lm_head.weight, trainer.model.lm_head.weight))
        """,
        folder,
        tmp_path,
    )
    assert found["losses"][-1] < found["losses"][0]
    assert found["class"] == "GPTForCausalLM" and found["same"]


def test_lm_eval_and_sentence_transformers_open_it(folder, model, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    found = run_without_hfllm(
        """
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
        evaluated = HFLM(pretrained=folder, device="cpu", dtype="float32", trust_remote_code=True)
        request = Instance(request_type="loglikelihood", doc={}, arguments=("", text), idx=0)
        found["score"] = evaluated.loglikelihood([request])[0][0]
        from sentence_transformers import SentenceTransformer
        encoder = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
        found["embedding"] = encoder.encode(text).tolist()
        """,
        folder,
        tmp_path,
    )
    ids = tokenizer.encode(TEXT)
    assert found["score"] == pytest.approx(token_log_probs(model, ids).sum().item(), abs=1e-4)
    encoder = SentenceTransformer(folder, device="cpu")  # where hfllm is, for comparison
    torch.testing.assert_close(torch.tensor(found["embedding"]), torch.tensor(encoder.encode(TEXT)))
