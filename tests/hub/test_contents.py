"""The code files that are pushed with a model are derived from what its code imports."""

from pathlib import Path

import hfllm
from hfllm.hub.contents import find_code_files, gather_files
from hfllm.model import configuration_gpt
from tests.conftest import make_tiny_config


def code_of(folder: Path) -> dict[str, bytes]:
    return {
        name: source if isinstance(source, bytes) else source.read_bytes()
        for name, source in gather_files(folder).items()
        if name.endswith(".py")
    }


def test_the_code_that_is_pushed_is_the_code_that_save_pretrained_copies(tmp_path):
    hfllm.GPTForCausalLM(make_tiny_config("modern")).save_pretrained(tmp_path)
    saved = {path.name: path.read_bytes() for path in tmp_path.glob("*.py")}
    assert {"configuration_gpt.py", "kernels_gpt.py", "modeling_gpt.py"} < set(saved)
    assert code_of(tmp_path) == saved
    package = Path(configuration_gpt.__file__).parent
    assert [path.name for path in find_code_files(package)] == sorted(saved)


def test_a_folder_of_an_earlier_version_is_pushed_with_the_code_it_was_saved_with(tmp_path):
    hfllm.GPTForCausalLM(make_tiny_config("modern")).save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.unlink()
    earlier = {"modeling_gpt.py": b"from .configuration_gpt import GPTConfig\n", "configuration_gpt.py": b""}
    for name, code in earlier.items():
        (tmp_path / name).write_bytes(code)
    assert code_of(tmp_path) == earlier


def test_a_folder_that_lost_a_code_file_is_pushed_with_the_packages_code(tmp_path):
    hfllm.GPTForCausalLM(make_tiny_config("modern")).save_pretrained(tmp_path)
    complete = code_of(tmp_path)
    (tmp_path / "kernels_gpt.py").unlink()
    (tmp_path / "modeling_gpt.py").write_text("from .configuration_gpt import a\nfrom .kernels_gpt import b\n")
    assert code_of(tmp_path) == complete
