"""The oldest supported transformers and the newest one on the package index write the same text with every cache.

Each release is installed beside the environment, in .cache/transformers/<version>. The reference is chapter 4's loop:
one row, no cache, the ids cropped to the learned positions at each step.
"""

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

import hfllm
from hfllm.model import loading_gpt
from tests.conftest import make_tiny_config


ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


# --- The caches' two names


def test_the_cache_has_its_names_of_all_releases(tiny_model):
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = tiny_model(ids).logits[:, -1]
    for name in ("cache", "past_key_values"):
        cache = transformers.DynamicCache(config=tiny_model.config)
        tiny_model(ids[:, :3], **{name: cache})
        assert cache.get_seq_length() == 3
        torch.testing.assert_close(tiny_model(ids[:, 3:], **{name: cache}).logits[:, 0], expected)


def test_a_cache_under_both_names_is_refused(tiny_model):
    caches = {name: transformers.DynamicCache() for name in ("cache", "past_key_values")}
    with pytest.raises(ValueError, match="two names of one argument"):
        tiny_model(torch.tensor([[5, 6]]), **caches)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_next_inputs_name_the_cache_as_the_release_does(tiny_model, name):
    """Within the learned positions and past them."""
    for length in (5, 40):
        cache = transformers.DynamicCache(config=tiny_model.config)
        inputs = tiny_model.prepare_inputs_for_generation(torch.ones(1, length, dtype=torch.long), **{name: cache})
        names = {"cache", "past_key_values"} & set(inputs)
        assert names == {name} or names == {"cache"}  # 5.24 renames what it is given
        if length == 5 or not tiny_model.model.learned_positions:
            assert inputs[names.pop()] is cache


# --- Releases that the tests do not know


def test_a_newer_transformers_than_the_tested_is_warned_of_once(tiny_model, monkeypatch):
    said = []
    monkeypatch.setattr(loading_gpt.logger, "warning_once", said.append)
    tested = Version(loading_gpt.NEWEST_TESTED_TRANSFORMERS)
    for installed in (f"{tested}.9", "5.23.0", transformers.__version__):
        monkeypatch.setattr(transformers, "__version__", installed)
        type(tiny_model)(tiny_model.config)
    assert not said
    monkeypatch.setattr(transformers, "__version__", f"{tested.major}.{tested.minor + 1}.0.dev0")
    type(tiny_model)(tiny_model.config)
    assert f"tested with transformers {tested} and older" in said[0]
    assert f"transformers {tested.major}.{tested.minor + 1}.0.dev0 is installed" in said[0]
    assert "use_cache=True and use_cache=False" in said[0]


def test_the_pinned_release_is_one_of_the_tested():
    pinned = re.search(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert Version(oldest_admitted()) <= Version(pinned[1])
    assert Version(pinned[1]).release[:2] <= Version(loading_gpt.NEWEST_TESTED_TRANSFORMERS).release


# --- Real releases


def oldest_admitted() -> str:
    requirement = re.search(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert requirement is not None
    return requirement[1]


@functools.cache
def newest_of_the_index() -> str:
    found = subprocess.run([*PIP, "index", "versions", "transformers"], capture_output=True, text=True)
    version = re.match(r"transformers \(([\w.]+)\)", found.stdout)
    if version is None:
        pytest.skip(f"no package index: {found.stderr.strip().splitlines()[-1:]}")
    return version[1]


def install_beside(version: str) -> Path:
    """A folder with this release of transformers, and with what it needs and the environment lacks."""
    folder = ROOT / ".cache" / "transformers" / version
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".installing-"))
    try:
        pip_install(f"transformers=={version}", unfinished)
        (distribution,) = importlib.metadata.distributions(name="transformers", path=[str(unfinished)])
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                is_met = requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
            except importlib.metadata.PackageNotFoundError:
                is_met = False
            if not is_met:
                pip_install(str(requirement), unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def pip_install(requirement: str, folder: Path) -> None:
    command = [*PIP, "install", "--quiet", "--no-deps", "--target", str(folder), requirement]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"{requirement} cannot be installed: {installed.stderr.strip().splitlines()[-1:]}")


COMPARE = """
import sys
import torch
import transformers
from transformers import AutoModelForCausalLM

version, reader = sys.argv[1:]
assert transformers.__version__.startswith(version), (transformers.__version__, transformers.__file__)
if reader == "hfllm":
    import hfllm
else:
    sys.modules["hfllm"] = None  # importing it is an error, as if it were not installed
torch.set_num_threads(1)

PROMPTS = [[5, 9, 11, 7, 30], [40, 8], [3, 60, 22, 17, 17, 9, 31]]
WIDTH = max(map(len, PROMPTS))
NUM_TOKENS = 20
ROWS = {
    "a row": (torch.tensor(PROMPTS[:1]), None),
    "a padded batch": (
        torch.tensor([[2] * (WIDTH - len(prompt)) + prompt for prompt in PROMPTS]),
        torch.tensor([[0] * (WIDTH - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]),
    ),
}


@torch.no_grad()
def write_by_hand(model, tokens):
    context = model.config.max_position_embeddings if model.config.position_embedding_type == "learned" else 10**6
    for _ in range(NUM_TOKENS):
        tokens = [*tokens, int(model(torch.tensor([tokens[-context:]]), use_cache=False).logits[0, -1].argmax())]
    return tokens[-NUM_TOKENS:]


different = []
for folder in ("modern", "modern-short", "book", "book-short"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=reader != "hfllm").eval()
    assert type(model).__module__.split(".")[0] == ("hfllm" if reader == "hfllm" else "transformers_modules")
    expected = [write_by_hand(model, prompt) for prompt in PROMPTS]
    for rows, (input_ids, attention_mask) in ROWS.items():
        ways = {
            "without a cache": {"use_cache": False},
            "with a cache": {},
            "with a static cache": {"cache_implementation": "static"},
            "prefilled in chunks": {"prefill_chunk_size": 3},
        }
        if rows == "a row":
            ways["with proposals from the prompt"] = {"prompt_lookup_num_tokens": 3}
        for way, options in ways.items():
            options |= {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None}
            written = model.generate(input_ids, attention_mask=attention_mask, **options)
            if written[:, input_ids.shape[1] :].tolist() != expected[: len(input_ids)]:
                different.append(f"{folder}, {rows}, {way}")
print("\\n".join(different))
sys.exit(len(different))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Both presets, with a context longer than the text and a shorter one."""
    root = tmp_path_factory.mktemp("releases")
    for preset in ("modern", "book"):
        for name, context in ((preset, 64), (f"{preset}-short", 12)):
            torch.manual_seed(0)
            config = make_tiny_config(preset, max_position_embeddings=context, eos_token_id=None)
            hfllm.GPTForCausalLM(config).save_pretrained(root / name)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["hfllm", "the folder's own code"])
@pytest.mark.parametrize("release", ["oldest", "newest"])
def test_a_release_writes_the_same_text_with_and_without_a_cache(release, reader, checkpoints, tmp_path):
    version = oldest_admitted() if release == "oldest" else newest_of_the_index()
    places = [str(install_beside(version)), *([str(ROOT)] if reader == "hfllm" else [])]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(places),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    command = [sys.executable, "-c", COMPARE, version, reader]
    finished = subprocess.run(command, cwd=checkpoints, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, f"transformers {version}: {finished.stdout}{finished.stderr[-3000:]}"
