"""Run transformers' own common tests on our classes, in both presets, and on Llama as the control.

    pip install parameterized httpx
    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers /tmp/transformers
    python docs/measurements/run_transformers_suite.py --checkout /tmp/transformers
    python docs/measurements/run_transformers_suite.py --checkout /tmp/transformers --slow -- -k "ModernTest and export"

Their tests are not in the wheel, and only some of them are in the sdist. They run from the checkout, which must be of
the installed version; none of them is copied into this repository. What follows `--` goes to pytest. The result is, for
each class, how many tests passed, were skipped (and why) and failed.
"""

import argparse
import collections
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers


ROOT = Path(__file__).parents[2]
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def find_version(checkout: Path) -> str:
    source = checkout / "src/transformers/__init__.py"
    match = re.search(r'^__version__ = "(.+)"', source.read_text(), re.MULTILINE) if source.exists() else None
    if match is None or not (checkout / "tests/causal_lm_tester.py").exists():
        raise SystemExit(
            f"error: {checkout} is not a checkout of transformers with its tests. Make one with\n  git clone --depth 1 "
            f"--branch v{transformers.__version__} https://github.com/huggingface/transformers {checkout}"
        )
    return match[1]


def assemble(folder: Path, checkout: Path, common: Path | None):
    """Fill the folder with links to the checkout and to the installed package, and with our test module."""
    tests = {path.name: path for path in (checkout / "tests").iterdir() if path.name != "models"}
    if common is not None:
        tests |= {path.name: path for path in (common / "tests").glob("*.py")}
    ours = folder / "tests/models/hfllm_gpt"
    ours.mkdir(parents=True)
    for name, path in tests.items():
        (folder / "tests" / name).symlink_to(path.resolve())
    for init in (folder / "tests/models/__init__.py", ours / "__init__.py"):
        init.touch()
    (ours / "test_modeling_hfllm_gpt.py").write_text((Path(__file__).with_name("transformers_suite.py")).read_text())
    for name in ("conftest.py", "utils"):
        (folder / name).symlink_to((checkout / name).resolve())
    (folder / "src").mkdir()
    (folder / "src/transformers").symlink_to(Path(transformers.__file__).parent)


def read_report(path: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Outcome and reason of each test, by class: {"ModernTest": {"test_x": ("skipped", "...")}}."""
    outcomes: dict[str, dict[str, tuple[str, str]]] = collections.defaultdict(dict)
    for case in ElementTree.parse(path).iter("testcase"):
        tests = outcomes[case.get("classname", "").split(".")[-1]]
        marks = [mark for mark in case if mark.tag in OUTCOMES]
        outcome = (OUTCOMES[marks[0].tag], marks[0].get("message", "")) if marks else ("passed", "")
        # A test with subtests has one line per subtest; the worst outcome counts.
        worst = ("passed", "skipped", "failed")
        name = case.get("name", "")
        tests[name] = max(tests.get(name, outcome), outcome, key=lambda pair: worst.index(pair[0]))
    return outcomes


def print_outcomes(outcomes: dict[str, dict[str, tuple[str, str]]]):
    for class_name, tests in sorted(outcomes.items()):
        counts = collections.Counter(outcome for outcome, _ in tests.values())
        print(f"\n{class_name}: {counts['passed']} passed, {counts['skipped']} skipped, {counts['failed']} failed")
        for name, (outcome, reason) in sorted(tests.items()):
            if outcome == "failed":
                control = outcomes.get("LlamaTest", {}).get(name, ("not run", ""))[0]
                print(f"  FAILED {name} (Llama: {control}): {reason.splitlines()[0] if reason else ''}")
        reasons = collections.Counter(
            re.sub(r".*is not in `self.pipeline_model_mapping`.*", "A pipeline for another kind of model", reason)
            for outcome, reason in tests.values()
            if outcome == "skipped"
        )
        for reason, number in reasons.most_common():
            print(f"  {number:3} skipped: {reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of transformers, with its tests")
    parser.add_argument(
        "--common",
        type=Path,
        help="an unpacked sdist of the installed version: its tests/*.py replace those of an older checkout",
    )
    parser.add_argument("--slow", action="store_true", help="also run what transformers marks slow (its exports)")
    parser.add_argument("--report", type=Path, help="keep pytest's JUnit report in this file")
    parser.add_argument("pytest_arguments", nargs="*", metavar="-- PYTEST_ARGUMENT")
    arguments = parser.parse_args()

    version = find_version(arguments.checkout)
    if version != transformers.__version__ and arguments.common is None:
        raise SystemExit(
            f"error: {arguments.checkout} is transformers {version}, but {transformers.__version__} is installed. "
            f"Check out v{transformers.__version__}, or pass --common an unpacked sdist of it."
        )
    for package in ("parameterized", "httpx"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(f"error: transformers' tests need {package}: pip install {package}") from None

    with tempfile.TemporaryDirectory() as folder:
        assemble(Path(folder), arguments.checkout, arguments.common)
        report = arguments.report.resolve() if arguments.report else Path(folder, "report.xml")
        paths = [folder, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            **({"RUN_SLOW": "1"} if arguments.slow else {}),
        }
        options = ["-q", "--disable-warnings", "-p", "no:cacheprovider", "--timeout", "1800"]
        command = [sys.executable, "-m", "pytest", "tests/models/hfllm_gpt", *options, f"--junitxml={report}"]
        command += arguments.pytest_arguments
        code = subprocess.run(command, cwd=folder, env=environment).returncode
        if not report.exists():
            raise SystemExit(code)
        print_outcomes(read_report(report))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
