"""Imports point one way, so that a file can be read without those above it."""

import ast
import graphlib
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

# What each part of the library may import of the library; a part is a file or a folder of hfllm/.
MAY_IMPORT: dict[str, set[str]] = {
    "tokenization": set(),
    "model": {"model"},
    "adapters": {"model"},
    "cli": {"adapters", "cli"},
    "runs": {"runs"},
    "data": {"data", "tokenization"},
    "evaluation": {"data", "evaluation"},
    "serving": {"data", "model", "serving", "tokenization"},
    "training": {"evaluation", "model", "runs", "training"},  # `requirements` counts the memory of the loss
    "fine_tuning": {
        *("adapters", "cli", "data", "evaluation", "fine_tuning", "hub", "report", "runs", "tokenization", "training"),
    },
    "conversion": {"conversion", "model"},
    "report": {"report", "runs"},
    "hub": {"adapters", "conversion", "hub", "model", "report", "runs"},
    "__init__": {"conversion", "model", "tokenization"},
}


def imported_modules(path: Path) -> set[str]:
    """The modules of hfllm and of the recipes that a file imports, by their dotted names."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:  # a module of the package, or a name in it
                is_module = ROOT.joinpath(*names, alias.name).with_suffix(".py").exists()
                modules.add(".".join([*names, alias.name] if is_module else names))
    return {module for module in modules if module.split(".")[0] in ("hfllm", "recipes")}


def name_of(path: Path) -> str:
    """`hfllm.data.corpus` for hfllm/data/corpus.py, `hfllm.data` for hfllm/data/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


LIBRARY = sorted((ROOT / "hfllm").rglob("*.py"))
IMPORTS = {name_of(path): imported_modules(path) for path in LIBRARY}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_part_of_the_library_imports_only_the_parts_below_it(path):
    part = path.relative_to(ROOT / "hfllm").with_suffix("").parts[0]
    for module in imported_modules(path):
        assert module.split(".")[0] == "hfllm", f"{path.name} imports a recipe"
        assert module.split(".")[1] in MAY_IMPORT[part], f"{path.name} imports {module}"


def test_each_part_of_the_library_has_its_rule_and_uses_every_part_that_it_may_import():
    used = {part: set() for part in MAY_IMPORT}
    for module, imports in IMPORTS.items():
        used[[*module.split("."), "__init__"][1]] |= {name.split(".")[1] for name in imports}
    assert used == MAY_IMPORT


def test_no_file_imports_itself_through_others_not_even_inside_a_function():
    assert {"hfllm.runs.files", "hfllm.runs.identity"} <= IMPORTS["hfllm.runs.folder"]
    assert IMPORTS["hfllm.conversion.loading"] == {"hfllm.model"}
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises a CycleError that names the files


def test_the_model_files_import_none_of_our_files_but_each_other():
    """They travel alone to the Hub, where only `from .sibling import x` works."""
    model = ROOT / "hfllm" / "model"
    siblings = {f"hfllm.model.{path.stem}" for path in model.glob("*_gpt.py")}
    for path in model.glob("*_gpt.py"):
        assert imported_modules(path) <= siblings - {"hfllm.model.modeling_gpt"}
    # transformers copies what the files of the auto_map import, one level deep.
    assert imported_modules(model / "modeling_gpt.py") == siblings - {"hfllm.model.modeling_gpt"}


def test_a_recipe_never_imports_another_recipe():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    for path in (ROOT / "recipes").glob("*.py"):
        names = {
            node.module if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not {name.split(".")[0] for name in names if name} & (recipes | {"recipes"})


def test_every_command_of_a_recipes_docstring_and_of_the_documents_names_files_that_exist():
    documents = {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")}
    documents -= {ROOT / "CHANGELOG.md"}  # it names what is gone
    texts = [path.read_text() for path in (ROOT / "Makefile", *documents)]
    texts += [path.read_text() for path in (ROOT / "recipes").rglob("*.*") if path.suffix in (".py", ".yaml")]
    named = {
        name for text in texts for name in re.findall(r"(?:recipes|accelerate_configs)/[\w/.-]+\.(?:py|yaml)", text)
    }
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
