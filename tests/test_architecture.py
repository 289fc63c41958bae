"""The layout, computed from the source: who may import whom, what every file has."""

import ast
import re
from pathlib import Path

import pytest

from exitkit import plugins

ROOT = Path(__file__).parent.parent
PACKAGES = {"exitkit": "exitkit", "methods": "exitkit.methods", "benchmarks": "exitkit.benchmarks"}
ROOMS = (
    "exitkit.benchmarks.commands",
    "exitkit.benchmarks.speed",
    "exitkit.benchmarks.campaign",
    "exitkit.benchmarks.diagnose",
    "exitkit.benchmarks.report",
    "exitkit.benchmarks.timing",
    "exitkit.benchmarks.published",
    "exitkit.benchmarks.recipes",
    "exitkit.cli",
    "exitkit.methods",
    "exitkit.training",
    "exitkit.inference",
    "exitkit.runs",
    "exitkit.strategy",
    "exitkit.networks",
    "exitkit.data",
    "exitkit.engine",
)
"""Rooms from top to bottom; a file imports from its own room and from those below."""
GROUND = {
    "exitkit.entry_points",
    "exitkit.errors",
    "exitkit.escaping",
    "exitkit.files",
    "exitkit.plugins",
    "exitkit.registration",
}


def modules():
    """{module: file} of the whole project."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


MODULES = modules()
LIBRARY = [path for path in MODULES.values() if path.is_relative_to(ROOT / "exitkit")]
METHODS = [path for path in MODULES.values() if path.is_relative_to(ROOT / "methods") and path.name[0] != "_"]
PACKAGE = list(MODULES.values())


def name(path):
    return str(path.relative_to(ROOT))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node):
    """(module, imported name) of every import, those inside functions and for type checkers included."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((child.module or "", alias.name) for alias in child.names)


def arrows(module):
    """The modules of the project that a module imports."""
    found = set()
    for source, imported in imports(tree(MODULES[module])):
        found |= {target for target in (f"{source}.{imported}", source) if target in MODULES and target != module} - (
            {source} if f"{source}.{imported}" in MODULES else set()
        )
    return found


GRAPH = {module: arrows(module) for module in MODULES}


def circles(graph):
    """The sets of modules that import each other in a circle (Tarjan's strongly connected components)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            found.append(members)

    for node in graph:
        if node not in index:
            visit(node)
    return [members for members in found if len(members) > 1]


def room(module):
    """The height of a module's room: 0 for the root, which only hands names on; the ground is lowest."""
    if module in GROUND:
        return len(ROOMS) + 1
    inside = [place for place, room in enumerate(ROOMS, 1) if f"{module}.".startswith(f"{room}.")]
    return max(inside, default=0)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def test_no_module_imports_itself_through_others():
    assert circles(GRAPH) == []


def test_every_arrow_points_down():
    up = [(module, target) for module, targets in GRAPH.items() for target in targets if room(target) < room(module)]
    assert up == []


def test_every_file_is_in_a_room():
    top = {"exitkit", "exitkit.__main__", "exitkit.benchmarks"}
    assert {module for module in MODULES if not room(module)} == top
    shown = {path.name for path in (ROOT / "exitkit").iterdir() if path.name[0] not in "._" and path.suffix != ".typed"}
    rooms = {room.rpartition(".")[2] for room in ROOMS if room.count(".") == 1} - {"methods", "benchmarks"}
    assert shown == rooms | {f"{ground.rpartition('.')[2]}.py" for ground in GROUND}


def test_imports_inside_functions_have_a_reason():
    """A fast command line needs none to be given: its rooms say so once, in their own text."""
    fast = ("exitkit/cli/", "benchmarks/commands/")
    for path in PACKAGE:
        lines = path.read_text(encoding="utf-8").splitlines()
        functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
        if name(path).startswith(fast):
            continue
        for function in functions:
            first = min((n.lineno for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)), default=0)
            near = lines[max(first - 3, 0) : first]
            assert not first or any("#" in line for line in near), f"{name(path)}:{first} gives no reason"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_never_asks_which_method_it_runs(path):
    methods = set(plugins.registered("method"))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare):
            words = {item.value for item in ast.walk(node) if isinstance(item, ast.Constant)}
            assert not words & methods, ast.unparse(node)


@pytest.mark.parametrize("folder", ["engine", "strategy", "runs", "training", "inference"])
def test_what_trains_and_evaluates_names_no_method(folder):
    methods = set(plugins.registered("method"))
    for path in (ROOT / "exitkit" / folder).rglob("*.py"):
        # The default of a recipe is joint training, by its name; and a phase may train the heads of any network.
        allowed = {"recipe.py": {"joint"}, "phase.py": {"heads"}, "base.py": {"heads"}}.get(path.name, set())
        for node in ast.walk(tree(path)):
            assert not (isinstance(node, ast.Constant) and node.value in methods - allowed), ast.unparse(node)


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_a_method_knows_no_device_rank_or_data_set_and_no_other_methods_private_parts(path):
    for module, imported in imports(tree(path)):
        assert not module.startswith(("exitkit.data", "exitkit.engine", "exitkit.training", "torch.distributed"))
        assert not (module.startswith("exitkit.methods") and imported.startswith("_")), imported
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"device", "cuda", "rank", "world", "_engine", "is_main"}, ast.unparse(node)


PAPERS = sorted({plugins.registered("method")[each].module for each in plugins.registered("method")})


@pytest.mark.parametrize("module", [module for module in PAPERS if module in MODULES])
def test_a_method_opens_with_its_paper_and_what_differs(module):
    opening = ast.get_docstring(tree(MODULES[module])) or ""
    assert re.search(r"Papers?:", opening)
    assert re.search(r"[Dd]iffers?|[Nn]othing (is known to )?differ", opening), "say what differs from the code"
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) < 400


@pytest.mark.parametrize("method", list(plugins.registered("method")))
def test_every_method_names_its_paper_its_formula_and_an_example(method):
    import doctest

    import exitkit

    plugin = plugins.load("method", method)
    text = plugin.__doc__ or ""
    assert "https://" in text, "the paper's link"
    assert re.search(r"\[(B|D|K|C)[^\]]*\]", text) or "phase" in text.lower(), "a formula with shapes"
    example = doctest.DocTestParser().get_doctest(text, {"exitkit": exitkit}, method, None, 0)
    assert example.examples, "a usage example"
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(example).failed == 0


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_all_that_is_public_says_what_it_is(path):
    module = tree(path)
    assert len(ast.get_docstring(module) or "") > 9
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
    for module in ("cli/__init__.py", "cli/options.py", "cli/train.py", "cli/catalogue.py", "plugins.py", "errors.py"):
        body = [n for n in tree(ROOT / "exitkit" / module).body if isinstance(n, ast.Import | ast.ImportFrom)]
        first = {found.split(".")[0] for found, _ in imports(ast.Module(body=body, type_ignores=[]))}
        assert not first & {"torch", "numpy", "pandas", "pydantic", "matplotlib"}
