import json
import platform

import torch

from hfllm.report import save_environment


def test_the_environment_says_versions_and_hardware_and_not_whose_they_are(tmp_path):
    save_environment(tmp_path, num_processes=3)
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["torch"] == torch.__version__ and found["python"] == platform.python_version()
    assert found["processes"] == 3 and found["cores"] >= 1 and found["memory_gib"] > 0
    assert platform.node() not in text and str(tmp_path) not in text
