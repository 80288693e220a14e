"""Over the loopback: push a model, pull and tune it where hfllm is not installed, and merge the adapter here."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfllm
from hfllm.adapters import add_lora, save_adapter
from hfllm.cli.arguments import parse_arguments
from hfllm.hub import PushError
from hfllm.hub.forms import save_merged
from tests.hub.conftest import clean_environment


RECIPE = Path(__file__).parents[2] / "recipes" / "push_to_hub.py"
TEXT = "a cat sees a dog"


def push(*argv: object) -> None:
    """Run recipes/push_to_hub.py in this process."""
    spec = importlib.util.spec_from_file_location("recipe_push_to_hub", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.main(parse_arguments(recipe.PushArguments, list(map(str, argv))))


def elsewhere(code: str, hub, folder: Path) -> dict:
    """Run code in a process that cannot import hfllm, has an empty cache and no token; returns its dict `found`."""
    beginning = f"""
        import json, sys
        sys.modules["hfllm"] = None  # importing it fails, installed or not
        out, text, found = {str(folder / "adapter")!r}, {TEXT!r}, {{}}
        import torch
        torch.manual_seed(0)
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("me/my-gpt", trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained("me/my-gpt", trust_remote_code=True)
        batch = tokenizer(text, return_tensors="pt")
        def logits(model):
            with torch.no_grad():
                return model.eval()(**batch).logits[0].tolist()
    """
    script = textwrap.dedent(beginning) + textwrap.dedent(code) + "\nprint('found:' + json.dumps(found))"
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=clean_environment(hub, folder),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("found:")[-1])


@pytest.mark.slow
def test_pushed_pulled_tuned_pushed_pulled_and_merged_nothing_is_lost(hub, run_folder, tmp_path):
    push("--model", run_folder, "--repo_id", "me/my-gpt")
    tuned = elsewhere(
        """
        found["pulled"] = logits(model)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = tuned.train()(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found |= {"losses": losses, "tuned": logits(tuned)}
        tuned.save_pretrained(out)
        """,
        hub,
        tmp_path / "you",
    )
    original = hfllm.GPTForCausalLM.from_pretrained(run_folder).eval()
    ids = AutoTokenizer.from_pretrained(run_folder)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(original(ids).logits[0], torch.tensor(tuned["pulled"]))
    assert tuned["losses"][-1] < tuned["losses"][0]

    adapter = tmp_path / "you" / "adapter"
    push("--model", adapter, "--repo_id", "me/my-lora", "--adapter")
    push("--model", adapter, "--repo_id", "me/my-chat", "--merge")
    pulled = elsewhere(
        """
        adapted = PeftModel.from_pretrained(model, "me/my-lora")
        found["adapted"] = logits(adapted)
        found["merged"] = logits(adapted.merge_and_unload())
        whole = AutoModelForCausalLM.from_pretrained("me/my-chat", trust_remote_code=True)
        found["merged_there"] = logits(whole)
        """,
        hub,
        tmp_path / "them",
    )
    for name, logits in pulled.items():
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(tuned["tuned"]), rtol=1e-5, atol=1e-5, msg=name)
    assert "model.safetensors" not in hub.files("me/my-lora")
    assert (adapter / "adapter_model.safetensors").read_bytes() == hub.files("me/my-lora")["adapter_model.safetensors"]


@pytest.mark.slow
def test_the_code_on_the_card_runs_unchanged(hub, run_folder, tmp_path):
    push("--model", run_folder, "--repo_id", "me/my-gpt")
    code = re.search(r"```python\n(.*?)```", hub.files("me/my-gpt")["README.md"].decode(), re.DOTALL)[1]
    environment = clean_environment(hub, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", f'import sys; sys.modules["hfllm"] = None\n{code}'],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("a cat ")


def test_the_native_form_needs_no_hfllm_code(hub, make_run):
    folder = make_run(seed=4, preset="modern")
    push("--model", folder, "--repo_id", "me/my-qwen3", "--native")
    files = hub.files("me/my-qwen3")
    assert json.loads(files["config.json"])["model_type"] == "qwen3"
    assert not any(name.endswith(".py") for name in files) and "# my-qwen3" in files["README.md"].decode()
    native = AutoModelForCausalLM.from_pretrained("me/my-qwen3").eval()
    ours = hfllm.GPTForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(native(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(PushError, match=r"another model: .*model_type is 'qwen3', here 'hfllm_gpt'"):
        push("--model", folder, "--repo_id", "me/my-qwen3")


def test_an_adapter_whose_base_is_a_folder_is_not_pushed_so(hub, run_folder, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(run_folder), "r": 4, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shutil.copyfile(run_folder / "model.safetensors", tmp_path / "adapter_model.safetensors")
    with pytest.raises(PushError, match=r"--base_model .*--merge"):
        push("--model", tmp_path, "--repo_id", "me/lora")
    push("--model", tmp_path, "--repo_id", "me/lora", "--base_model", "me/my-gpt")
    assert json.loads(hub.files("me/lora")["adapter_config.json"])["base_model_name_or_path"] == "me/my-gpt"
    assert str(run_folder) not in "".join(hub.files("me/lora")[name].decode() for name in ("README.md",))


def test_an_adapter_is_merged_into_the_base_that_it_was_trained_on_and_into_no_other_of_its_shape(run_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(run_folder, base)
    adapted = add_lora(hfllm.GPTForCausalLM.from_pretrained(base), r=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    save_adapter(adapted, tmp_path / "adapter")
    save_merged(tmp_path / "adapter", tmp_path / "merged")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        whole = hfllm.GPTForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(whole(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-5)

        other = hfllm.GPTForCausalLM.from_pretrained(base)
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(base)
    with pytest.raises(PushError, match="weights that it was trained on are not these"):
        save_merged(tmp_path / "adapter", tmp_path / "again")


def test_an_adapter_beside_its_merged_model_is_pushed_with_the_runs_numbers(hub, make_run):
    folder = make_run(seed=5)
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "me/my-gpt", "r": 4, "task_type": "CAUSAL_LM"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    push("--model", folder, "--repo_id", "me/lora", "--adapter")
    files = hub.files("me/lora")
    assert len(files["adapter_model.safetensors"]) == 100 and "model.safetensors" not in files
    assert "config.json" not in files and "tokenizer.json" in files
    card = files["README.md"].decode()
    assert "base_model: me/my-gpt" in card and "bits_per_byte" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--merge"], "--merge is for a LoRA adapter"),
        (["--adapter"], "--adapter is for a LoRA adapter"),
        (["--base_model", "me/base"], "--base_model is for a LoRA adapter"),
        (["--repo_id", "me / x"], "is not an id of the Hub"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_sent(hub, run_folder, options, message):
    with pytest.raises((ValueError, PushError), match=message):
        push("--model", run_folder, "--repo_id", "me/my-gpt", *options)
    assert hub.requests == []
