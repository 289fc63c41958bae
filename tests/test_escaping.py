"""Text of users and files is shown as text, in every format and by every command."""

import io
import json
import re
import subprocess
import sys
import warnings
from html import unescape

import pandas as pd
import pytest
from fake_runs import FakeRun

import exitkit
from exitkit.benchmarks.report import Context, ReportOptions, collect, print_report, write_report
from exitkit.benchmarks.report.comparison import Missing
from exitkit.cli.terminal import Console
from exitkit.errors import Note, print_warnings
from exitkit.escaping import code_in_markdown, counted, in_csv, in_latex, in_markdown, one_line, printable
from exitkit.runs.folder import RunFolder

from toy import FEW

HIDING = "\x1b[2J\x1b]0;owned\x07\r\x08\x9b1m\u202eabc"
EVIL = f'=1+1|<b>*x*</b>`$x_1$ & 50%#{{~^}}\\ "q" − [a](b) {HIDING}'
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_control_characters_are_replaced_one_by_one_and_lines_are_kept():
    assert printable("a\x1b[1mb\tc\nd\x7f\u202ee") == "a?[1mb\tc\nd??e"
    assert printable("名前 ±− é") == "名前 ±− é"
    assert one_line(" a\n\r\x1bb\x0c c ") == "a ?b c"


def test_a_count_has_its_noun():
    counts = [counted(number, "epoch") for number in (0, 1, 2, 1_200)]
    assert counts == ["0 epochs", "1 epoch", "2 epochs", "1,200 epochs"]
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a|b", r"a\|b"),
        ("<script>", "&lt;script&gt;"),
        ("*a* `b` [c](d) ~e~", r"\*a\* \`b\` \[c\](d) \~e\~"),
        ("boost_net _a_", r"boost_net \_a\_"),
        ("# title", r"\# title"),
        ("a\nb", "a b"),
        ("AT&T &amp; R", "AT&T &amp;amp; R"),
    ],
)
def test_markdown_shows_the_text(text, written):
    assert in_markdown(text) == written


def test_code_in_markdown_may_contain_backticks():
    assert code_in_markdown("a b") == "`a b`" and code_in_markdown("a ``b`` c") == "``` a ``b`` c ```"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("50 % & a_b #1 $x$ {y}", r"50 \% \& a\_b \#1 \$x\$ \{y\}"),
        ("\\input~^", r"\textbackslash{}input\textasciitilde{}\textasciicircum{}"),
        ("more than noise: p < 0.05 after", "more than noise: $p < 0.05$ after"),
        ("−1.5 ± 2, 3–4", r"$-$1.5 $\pm$ 2, 3--4"),
    ],
)
def test_latex_shows_the_text_and_sets_mathematics(text, written):
    assert in_latex(text) == written


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", " =1", "\t=1"])
def test_a_spreadsheet_executes_no_cell(text):
    written = in_csv(pd.DataFrame({"name": [text, "-2.5", "a"], "value": [-1.5, 2, 3]}))
    assert written["name"].tolist() == [f"'{text}", "-2.5", "a"] and written["value"].tolist() == [-1.5, 2, 3]


def test_tables_on_a_terminal_contain_no_control_characters_but_those_of_rich():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard", highlight=False)
    console.print(f"a {HIDING}", style="red", markup=False)
    written = console.file.getvalue()
    assert written.startswith("\x1b[31m") and "\x1b[2J" not in written and "?[2J" in written
    assert not CONTROL.search(written.replace("\x1b", ""))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of a report of which every text is hostile, and what is printed of it."""
    folder = tmp_path_factory.mktemp("evil")

    class Evil(FakeRun):
        def class_names(self):
            return [f"{EVIL} {label}" for label in range(10)]

        def metrics(self):
            columns = {
                f"{a}_{b}_{k}": [1.0] for a in ("train", "validation") for b in ("loss", "accuracy") for k in (1, 2)
            }
            return pd.DataFrame({"phase": [EVIL], "epoch": [1], "lr": [0.1], **columns})

        def environment(self):
            return {"exitkit": "1", "torch": EVIL, "device": "cpu", "gpu": EVIL}

    members = [Evil(name, seed) for name in ("joint", "ge") for seed in range(2)]
    for run in members:
        run.recipe.threads = 1
    missing = [Missing({**members[0].identity, "method": json.dumps("imta")}, EVIL)]
    context = Context(EVIL, EVIL, missing=missing, commands=[EVIL])
    comparison = collect(members, options=ReportOptions(classes=True), context=context)
    write_report(comparison, folder, runs=members, formats=("csv", "md", "latex", "html"))
    console = Console(file=io.StringIO(), width=200)
    print_report(comparison, console)
    return folder, console.file.getvalue()


def test_a_report_shows_hostile_text_as_text_in_every_format(written):
    folder, terminal = written
    for path in folder.iterdir():
        assert not CONTROL.search(path.read_text(encoding="utf-8")), path.name
    assert not CONTROL.search(terminal)
    for name in ("missing", "recall", "learning"):
        cells = pd.read_csv(folder / f"{name}.csv").select_dtypes(exclude="number").to_numpy().ravel()
        assert any("1+1" in cell for cell in cells) and not any(cell.startswith("=") for cell in cells)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in html and "&lt;b&gt;*x*&lt;/b&gt;" in html
    assert "=1+1|<b>" in unescape(html) and html.count("How this report was made") == 2
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "<b>" not in re.sub(r"(`+) .*? \1", "", markdown) and markdown.startswith(
        r"# =1+1\|&lt;b&gt;\*x\*&lt;/b&gt;\`"
    )
    rows = [line for line in (folder / "missing.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    latex = (folder / "report.tex").read_text(encoding="utf-8") + (folder / "recall.tex").read_text(encoding="utf-8")
    assert r"=1+1|$<$b$>$*x*$<$/b$>$`\$x\_1\$ \& 50\%\#\{\textasciitilde{}\textasciicircum{}\}" in latex
    assert "xelatex or lualatex" in latex.splitlines()[0] + latex.splitlines()[1]


def test_captions_keep_their_distance_and_numbers_have_minus_signs(written):
    folder, _ = written
    latex = (folder / "differences.tex").read_text(encoding="utf-8")
    assert latex.index(r"\setlength{\belowcaptionskip}{6pt}") < latex.index(r"\caption")
    assert re.search(r"\$-\$\d", latex) or "+0." in latex
    assert not re.search(r"[& {]-\d", latex)
    assert "$p < 0.05$" in (folder / "verdicts.tex").read_text(encoding="utf-8")
    assert "<i>p</i> &lt; 0.05" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory):
    """A folder of runs: a finished one with hostile names of classes, and failed ones."""
    out = tmp_path_factory.mktemp("evil runs")
    run = exitkit.train({"method": "joint", "epochs": 1, **FEW}, out)
    about = run.environment()
    about["class_names"] = [f"{HIDING}{number}" for number in range(10)]
    (run.path / "environment.json").write_text(json.dumps(about))
    failed = out / "failed"
    failed.mkdir()
    (failed / "recipe.json").write_text(json.dumps(run.recipe.with_values(seed=1).model_dump(mode="json")))
    progress = {"phase": HIDING, "epoch": 1, "epochs": 2, "fraction": 0.5, "losses": [1.0], "accuracies": [1.0]}
    (failed / "progress.json").write_text(json.dumps(progress | {"host": "another", "when": 0}))
    (out / "failures").mkdir()
    (out / "failures" / "failed.json").write_text(json.dumps({"reason": EVIL}))
    return out, RunFolder(run.path)


@pytest.mark.parametrize(
    "command",
    [
        "show RUN --classes",
        "show RUN --json",
        "watch OUT --once",
        "watch OUT --json",
        "report OUT --classes --format md",
        "reproducibility OUT",
    ],
)
def test_no_command_prints_control_characters(command, evil_run, cli):
    out, run = evil_run
    result = cli(*(str({"RUN": run.path, "OUT": out}.get(word, word)) for word in command.split()))
    assert result.code == 0 and not CONTROL.search(result.out + result.errors), repr(result.out)


def test_errors_and_notes_contain_no_control_characters(cli, capsys, tmp_path):
    (tmp_path / "recipe.toml").write_text('method = "\\u001b[2Jjoint"\n')
    result = cli("train", "--recipe", "recipe.toml")
    assert result.code == 2 and r"\x1b[2Jjoint" in result.errors and not CONTROL.search(result.errors)
    with warnings.catch_warnings():
        print_warnings()
        warnings.warn(Note(f"left out {HIDING}"), stacklevel=1)
    assert not CONTROL.search(capsys.readouterr().err)


@pytest.mark.parametrize("arguments", ["['--help']", "['list']", "['list', '--json']"])
def test_a_reader_that_closes_the_pipe_ends_the_command_without_a_traceback(arguments):
    command = [sys.executable, "-c", f"import exitkit.cli\nexitkit.cli.main({arguments})"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(timeout=120) == 1 and process.stderr.read() == b""
