"""The documents agree with the project: their code runs, and their numbers and commands are those of the project."""

import json
import re
from pathlib import Path

import pytest

from exitkit.cli import main
from exitkit.plugins import load, registered

from doc_pages import installed

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_page_shows_rows_of_the_report_of_the_study(page):
    report = (ROOT / "docs/results/cifar100/report.md").read_text(encoding="utf-8").splitlines()
    paragraphs = (ROOT / page).read_text(encoding="utf-8").split("\n\n")
    rows = next(part for part in paragraphs if part.startswith("| method ")).splitlines()
    assert len(rows) >= 5 and set(rows) <= set(report)


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    compare, test = (block.strip() for block in blocks(README, "sh")[:2])
    assert test in script
    for package, version in re.findall(r"\b(torch|torchvision) (\d+\.\d+\.\d+)", README):  # what it says is tested
        assert f"{package}=={version}" in script
    assert compare.replace("pip install -e .", "pip install -q -e .").split(" && ")[1] in script


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), space)
    assert "boostnet" in capsys.readouterr().out


@pytest.fixture
def contributed(tmp_path):
    """The documents' example method, as an installed package looks to Python."""
    yield installed(ROOT / "docs/examples/random-exits", tmp_path)
    registered.cache_clear()
    load.cache_clear()


def test_the_example_method_trains_by_name_and_is_listed(contributed, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        return end.value.code, capsys.readouterr()

    monkeypatch.syspath_prepend(str(contributed))
    monkeypatch.chdir(tmp_path)
    registered.cache_clear()
    code, said = run("train", "--method", "ge+random-exits", "--set", "keep=0.8", "--epochs", "1")
    assert code == 0, said.err
    (trained,) = (tmp_path / "runs").iterdir()
    assert json.loads((trained / "recipe.json").read_text())["method_settings"]["random-exits.keep"] == 0.8
    listed = json.loads(run("list", "methods", "--json")[1].out)
    (entry,) = [entry for entry in listed if entry["name"] == "random-exits"]
    assert entry["slots"] == ["exit weights"] and entry["fields"][0]["default"] == 0.5
    code, said = run("train", "--method", "random-exits", "--set", "keep=2")
    assert code == 2 and "expected a share between 0 and 1" in said.err


def test_the_example_method_draws_alike_at_one_place_and_anew_at_the_next(contributed, monkeypatch):
    import torch

    import exitkit

    from toy import chain, sgd

    monkeypatch.syspath_prepend(str(contributed))
    from random_exits import RandomExits

    network = chain(exits=6)
    run = exitkit.Run.local(network, RandomExits(), sgd(network))
    drawn = []
    for step in range(400):
        run.position.step = step
        torch.rand(step % 3)  # what ran before must not matter
        assert run.weights() == run.weights()
        drawn.append(run.weights())
    means = torch.tensor(drawn).mean(0)
    assert means[-1] == 1 and ((means[:-1] - 0.5).abs() < 0.1).all()


PAGES = sorted((ROOT / "docs/methods").glob("*.md"))


def test_every_method_has_a_page_and_the_list_of_pages_its_slots():

    index = (ROOT / "docs/methods/README.md").read_text(encoding="utf-8")
    for name, point in registered("method").items():
        page = point.module.rpartition(".")[2]
        assert (ROOT / f"docs/methods/{page}.md").exists(), name
        (row,) = [line for line in index.splitlines() if line.startswith("| `") and f"`{name}`" in line]
        assert f"[{page}]({page}.md)" in row
        assert all(slot in row for slot in load("method", name)().claims() if name != "imta"), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_tests_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"tests/((?:\w+/)*\w+\.py)(?:::(\w+))?", text)
    assert named
    for file, test in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, test


def test_the_matrix_names_every_method_and_no_failure():

    text = (ROOT / "docs/matrix.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | ✓ | ✓ | ✓ | ✓ |" in text for name in registered("method"))
    assert "fails" not in text
