"""The house rules that a machine can hold: who may import whom, how long a function is, how files are loaded."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
MAY_IMPORT = {"data": {"data", "utils"}, "model": {"model", "utils"}, "utils": {"utils"}}
SCRIPTS = sorted(PROJECT.glob("*.py"))
MODULES = sorted(path for package in MAY_IMPORT for path in (PROJECT / package).rglob("*.py"))
SHORT = [PROJECT / name for name in ("cross_teacher_contr.py", "cross_teacher_deeplabv3+.py", "ablate.py")]


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The first parts of the names of all modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_packages_import_only_what_the_layout_allows(path: Path):
    package = path.relative_to(PROJECT).parts[0]
    ours = imported(path) & {*MAY_IMPORT, "tests", *(script.stem for script in SCRIPTS)}
    assert ours <= MAY_IMPORT[package]


def test_packages_are_not_imported_as_names():
    for path in [*MODULES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & set(MAY_IMPORT), path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_answer_help_and_wrong_keys_before_torch_is_imported(path: Path):
    heavy = {"torch", "torchvision", "cv2", "numpy", "data", "model", "matplotlib"}
    assert not imported(path, top_level_only=True) & heavy


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.name)
def test_scripts_that_only_wire_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= 90


def test_the_second_training_script_is_the_first_with_another_network():
    """Its name cannot stand in an import, so nothing may live there."""
    lines = [line for line in (PROJECT / "cross_teacher_deeplabv3+.py").read_text().splitlines() if line]
    assert len(lines) == 5
    assert "from cross_teacher_contr import main" in lines


def test_functions_stay_readable():
    long = []
    for path in [*MODULES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 65:
                long.append(f"{path.name}:{node.lineno} {node.name}")
    assert long == []


def test_every_test_that_the_pages_name_exists():
    pages = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text())}
    source = "".join(path.read_text() for path in (PROJECT / "tests").glob("*.py"))
    assert len(named) > 20
    assert [name for name in sorted(named) if f"def {name}(" not in source] == []


def test_the_step_of_the_paper_fits_one_screen():
    tree = ast.parse((PROJECT / "model" / "cross_teacher.py").read_text())
    step = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "training_step")
    assert (step.end_lineno or 0) - step.lineno < 40


def test_every_file_is_loaded_with_literal_weights_only():
    calls = 0
    for path in [*MODULES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls += 1
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                value = given.get("weights_only")
                assert isinstance(value, ast.Constant), path
                assert value.value is True, path
    assert calls == 1, "one place reads files"


def test_every_module_and_public_function_says_what_it_is():
    silent = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        silent += [] if ast.get_docstring(tree) or not tree.body else [str(path)]
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{path.name}:{node.lineno} {node.name}")
    assert silent == []
