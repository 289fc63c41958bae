"""The house plan, held by its own source: who may import whom, what every file has."""

import ast
import re
from pathlib import Path

import pytest

from exitkit import plugins

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "exitkit").rglob("*.py"))
METHODS = sorted((ROOT / "methods").glob("[!_]*.py"))
HARNESS = sorted((ROOT / "benchmarks").rglob("*.py"))
PACKAGE = [*LIBRARY, *METHODS, *HARNESS]


def name(path):
    return str(path.relative_to(ROOT))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node, typing_only=False):
    """(module, imported name) of every import, those for type checkers left out unless asked for."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not typing_only:
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((child.module or "", alias.name) for alias in child.names)
        else:
            yield from imports(child, typing_only)


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_imports_no_method_and_no_benchmark(path):
    for module, _ in imports(tree(path), typing_only=True):
        assert not module.startswith(("exitkit.methods", "exitkit.benchmarks", "methods", "benchmarks")), module


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_never_asks_which_method_it_runs(path):
    methods = set(plugins.registered("method"))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare):
            words = {item.value for item in ast.walk(node) if isinstance(item, ast.Constant)}
            assert not words & methods, ast.unparse(node)


@pytest.mark.parametrize("word", ["engine", "training", "session", "feed", "run", "evaluation", "exit_outputs"])
def test_what_trains_and_evaluates_names_no_method(word):
    methods = set(plugins.registered("method"))
    for node in ast.walk(tree(ROOT / "exitkit" / f"{word}.py")):
        assert not (isinstance(node, ast.Constant) and node.value in methods), ast.unparse(node)


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_a_method_knows_no_device_rank_or_data_set_and_no_other_methods_private_parts(path):
    for module, imported in imports(tree(path)):
        assert not module.startswith(("exitkit.data", "exitkit.engine", "exitkit.training", "torch.distributed"))
        assert not (module.startswith("exitkit.methods") and imported.startswith("_")), imported
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"device", "cuda", "rank", "world", "_engine", "is_main"}, ast.unparse(node)


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_a_method_opens_with_its_paper_and_what_differs(path):
    opening = ast.get_docstring(tree(path)) or ""
    assert "Paper:" in opening
    assert re.search(r"[Dd]iffers|[Nn]othing differs", opening), "say what differs from the published code"


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_files_and_functions_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_all_that_is_public_says_what_it_is(path):
    module = tree(path)
    assert ast.get_docstring(module)
    scopes = [module, *(node for node in module.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    for scope in scopes:
        for node in scope.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} (line {node.lineno})"


def test_nothing_names_a_place_on_the_machine_that_it_was_written_on():
    kinds = {".py", ".md", ".toml", ".cfg", ".csv", ".tex", ".json", ".yml"}
    texts = [ROOT / ".ci" / "run", *(path for path in ROOT.glob("*") if path.suffix in kinds)]
    for folder in ("exitkit", "methods", "benchmarks", "tests", "docs"):
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    for path in texts:
        found = re.search(r"(?<![\w.~}])/(work|home|root|tmp|mnt|srv|Users)/", path.read_text(encoding="utf-8"))
        assert not found, f"{name(path)} names {found[0]}"


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_nothing_is_left_undone(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
            # Only what a plugin has to provide may be left to it.
            assert path.name == "base.py"


def test_what_the_command_line_imports_first_is_light():
    for module in ("cli/__init__.py", "cli/options.py", "cli/train.py", "catalogue.py", "plugins.py", "errors.py"):
        module_level = {found for found, _ in _top_level(tree(ROOT / "exitkit" / module))}
        assert not {part.split(".")[0] for part in module_level} & {
            "torch",
            "numpy",
            "pandas",
            "pydantic",
            "matplotlib",
        }


def _top_level(module):
    body = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    yield from imports(ast.Module(body=body, type_ignores=[]))
