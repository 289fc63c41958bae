"""The site agrees with the project: paths, files of a run, figures, counted tables, the notebook, the citation."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from doc_pages import DOCS, ROOT

sys.path.insert(0, str(DOCS / "_sphinx"))

MAP = (DOCS / "map.md").read_text(encoding="utf-8")
FOLDER = (DOCS / "run-folder.md").read_text(encoding="utf-8")
NOTEBOOK = DOCS / "notebooks/first-comparison.ipynb"


def paths_on_the_map(text):
    """Yield the paths in each row; a bare file name is in the folder of the path before it."""
    for row in text.splitlines():
        folder = ROOT
        for name in re.findall(r"`([\w./-]+(?:\.py|/))`", row):
            path = ROOT / name if "/" in name else folder / name
            folder = path if name.endswith("/") else path.parent
            yield path


def test_every_path_on_the_map_exists():
    missing = [str(path) for path in paths_on_the_map(MAP) if not path.exists()]
    assert not missing


def test_the_table_of_packages_on_the_map_names_every_file_of_the_code_once():
    table = MAP.partition("## Packages")[2].partition("\n## ")[0]
    named = sorted(path for path in paths_on_the_map(table) if path.suffix == ".py")
    code = [path for folder in ("exitkit", "methods", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert named == sorted(path for path in code if path.name != "__init__.py")


def test_the_order_of_packages_on_the_map_is_that_of_the_imports():
    table = MAP.partition("## Packages")[2].partition("\n## ")[0]
    folders = re.findall(r"^\| `([\w/]+)/` \|", table, flags=re.MULTILINE)
    modules = [name.replace("/", ".") if name.startswith("exitkit") else f"exitkit.{name}" for name in folders]
    modules = [name.replace("/", ".") for name in modules]
    for place, folder in enumerate(folders[:-1]):
        for path in (ROOT / folder).rglob("*.py"):
            for name in imported(path):
                above = [other for other in modules[:place] if name == other or name.startswith(f"{other}.")]
                assert not above, f"{path.relative_to(ROOT)} imports {name}"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


GUIDES = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", GUIDES, ids=lambda path: path.name)
def test_the_tests_that_a_guide_names_exist(page):
    named = re.findall(r"(?<![\w/-])((?:tests/)?(?:\w+/)*test_\w+\.py)", page.read_text(encoding="utf-8"))
    elsewhere = {"docs/examples/random-exits/test_random_exits.py"}
    missing = [name for name in named if not (ROOT / "tests" / name.removeprefix("tests/")).is_file()]
    assert not set(missing) - elsewhere


def test_no_guide_names_a_command_that_installs_the_cuda_build_by_name():
    for page in GUIDES:
        assert not re.search(r"pip3? install [^\n]*\btorch\b", page.read_text(encoding="utf-8")), page.name


def test_the_citation_names_the_version_that_is_installed():
    import exitkit

    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(": ", 1) for line in lines if re.match(r"[\w-]+: ", line))
    assert values["version"] == exitkit.__version__ and values["title"] == "exitkit" and values["license"] == "MIT"
    assert values["cff-version"] == "1.2.0" and "message" in values and "authors:" in lines


def test_every_page_is_in_the_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {line for block in re.findall(r"```{toctree}\n(.*?)```", index, flags=re.DOTALL) for line in block.split()}
    evidence = runpy.run_path(str(DOCS / "conf.py"))["EVIDENCE"]
    assert "EVIDENCE" in listed and {"performance", "reproducibility"} <= set(evidence)
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert not pages - listed - set(evidence)


def test_the_page_of_commands_has_every_command_once():
    from importlib.metadata import entry_points

    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    shown = re.findall(r"^### (\S+)\n\n```{command} \1\n```$", text, flags=re.MULTILINE)
    points = entry_points(group="exitkit.commands")
    assert sorted(shown) == sorted({point.name for point in points if point.value.startswith("exitkit.")})


def test_the_page_of_recipes_names_every_key_of_a_comparison_and_has_the_other_keys_from_the_code():
    from exitkit.cli.options import COMPARISON_KEYS

    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE))
    assert not [key for key in COMPARISON_KEYS if f"`{key}`" not in rows]
    assert "```{keys} run\n```" in text and "```{keys} report\n```" in text


def test_the_reference_has_all_that_the_package_hands_out():
    import exitkit

    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert not [name for name in exitkit.__all__ if not re.search(rf":: {name}$", text, flags=re.MULTILINE)]


def test_the_page_of_the_run_folder_names_every_file_that_a_run_has(tmp_path, monkeypatch):
    import exitkit

    monkeypatch.setattr("exitkit.data.digits._TEST", 1400)
    run = exitkit.train({"method": "metagf", "epochs": 1, "probe_every": 1}, out=tmp_path)
    (run.path / "latency.json").touch()
    files = {path.name for path in run.path.iterdir()}
    assert {"learned.json", "probes.safetensors"} <= files
    unnamed = [name for name in files if f"| `{name}` |" not in FOLDER]
    assert not unnamed, unnamed
    named = set(
        re.findall(r"^\| `([\w.-]+\.\w+)` \|", FOLDER.partition("## Files of a comparison")[0], flags=re.MULTILINE)
    )
    assert named - files <= {"progress.json", "images.csv.gz"}, "named, but no run has it"
    for part in ("probes", "outputs-test"):
        keys = run.probes() if part == "probes" else run.outputs("test")
        assert all(f"`{key}`" in FOLDER for key in keys)
    assert all(f"`{name}`" in FOLDER or name in FOLDER for name in run.costs()[0])


def test_what_the_tables_of_costs_hold_is_what_the_networks_cost():
    from measure import MEASURED, preset, presets

    from exitkit import build_network, build_strategy
    from exitkit.plugins import registered

    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert measured["presets"].keys() == set(presets())
    assert measured["added"].keys() == registered("method").keys()
    assert preset("sdn-tiny") == measured["presets"]["sdn-tiny"]
    network = build_network(measured["example"]["network"])
    before = sum(p.numel() for p in network.parameters())
    build_strategy("isc").adapt(network)
    assert sum(p.numel() for p in network.parameters()) - before == measured["added"]["isc"]["params"]


def test_every_figure_shown_is_drawn_and_every_one_drawn_is_shown(tmp_path):
    shown = set()
    for page in DOCS.rglob("*.md"):
        shown |= set(re.findall(r"figures/([\w-]+)\.svg", page.read_text(encoding="utf-8")))
    done = subprocess.run(
        [sys.executable, DOCS / "figures/draw.py", tmp_path], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert shown == drawn == {path.stem for path in (DOCS / "figures").glob("*.svg")}


def test_the_links_between_pages_lead_somewhere():
    for page in (*DOCS.rglob("*.md"), *ROOT.glob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_example_method_passes_its_own_test_once_pip_has_installed_it(tmp_path, monkeypatch):
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    source, place = tmp_path / "source", tmp_path / "place"
    shutil.copytree(DOCS / "examples/random-exits", source, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *offline, "--target", place, source], check=True)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "random_exits", raising=False)
    own = runpy.run_path(str(source / "test_random_exits.py"))
    assert Path(sys.modules["random_exits"].__file__).parent == place
    tests = [value for name, value in own.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_notebook_is_whole_and_was_executed():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert NOTEBOOK.stat().st_size < 300_000
    for cell in code:
        ast.parse("".join(line for line in cell["source"] if not line.startswith("%")))


@pytest.mark.full
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(tmp_path.rglob("results.json"))
