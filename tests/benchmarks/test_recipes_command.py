"""`exitkit recipes`: what is shipped, a copy of it to edit, and what is wrong with one that was edited."""

import tomllib
from pathlib import Path

import pytest

from exitkit.benchmarks import recipes as shipped

FILES = {path.stem: path for folder in shipped.__path__ for path in Path(folder).glob("*.toml")}


@pytest.fixture
def cli(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    return cli


def files():
    return {path: path.read_bytes() for path in Path().rglob("*")}


def test_list_names_every_recipe_and_says_what_it_is(cli):
    code, printed, _ = cli("recipes", "list")
    told = dict(line.split(maxsplit=1) for line in printed.splitlines())
    titles = {name: tomllib.loads(path.read_text(encoding="utf-8"))["title"] for name, path in FILES.items()}
    assert code == 0 and "digits" in told
    assert {name: summary.strip() for name, summary in told.items()} == titles


def test_names_are_whole_on_a_narrow_screen(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, printed, _ = cli("recipes", "list")
    assert {line.split()[0] for line in printed.splitlines() if not line.startswith(" ")} == FILES.keys()


@pytest.mark.parametrize("name", sorted(FILES))
def test_show_prints_the_file(name, cli):
    assert cli("recipes", "show", name) == (0, FILES[name].read_text(encoding="utf-8"), "")


def test_copy_writes_the_file_and_says_how_to_run_it(cli):
    code, printed, _ = cli("recipes", "copy", "digits")
    assert code == 0 and "exitkit compare --recipe digits.toml" in printed
    assert Path("digits.toml").read_bytes() == FILES["digits"].read_bytes()
    code, printed, _ = cli("recipes", "copy", "digits", "mine.toml")
    assert code == 0 and "exitkit compare --recipe mine.toml" in printed
    assert Path("mine.toml").read_bytes() == FILES["digits"].read_bytes()


def test_copy_never_writes_over_what_is_there(cli):
    Path("digits.toml").write_text("epochs = 3")
    Path("folder").mkdir()
    before = {"digits.toml": b"epochs = 3"}
    cli("recipes", "copy", "digits").refused("digits.toml already exists; choose another file")
    cli("recipes", "copy", "digits", "digits.toml").refused("digits.toml already exists")
    cli("recipes", "copy", "digits", "folder").refused("folder already exists")
    assert {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["show", "copy", "validate"])
def test_a_name_that_there_is_not_gives_the_nearest(command, cli):
    cli("recipes", command, "digts").refused("unknown recipe 'digts'; did you mean digits")
    cli("recipes", command, "nowhere/digits.toml").refused("recipe nowhere/digits.toml can't be read")
    assert not files()


def test_copy_into_a_folder_that_can_not_be_made_is_one_line(cli):
    Path("file").touch()
    cli("recipes", "copy", "digits", "file/mine.toml").refused("can't be written")


GOOD = """
title = "a study"
methods = ["ge", {name = "boostnet", temperature = 0.25}]
backbone = ["msdnet-tiny", "ranet-tiny"]
seeds = 3
epochs = 2
published = ["boostnet/table1"]
[sweep]
batch_size = [64, 128]
"""


def test_validate_says_what_a_good_recipe_runs(cli):
    Path("good.toml").write_text(GOOD)
    before = files()
    code, printed, errors = cli("recipes", "validate", "good.toml")
    # Three methods, two networks, two batch sizes, three seeds.
    expected = "good.toml is valid: 36 runs of joint, ge, boostnet on msdnet-tiny, ranet-tiny and digits"
    assert (code, " ".join(printed.split()), errors) == (0, expected, "")
    assert files() == before


def test_validate_takes_the_name_of_a_shipped_recipe(cli):
    # Four methods with two seeds.
    _, printed, _ = cli("recipes", "validate", "digits")
    assert printed.startswith("digits is valid: 8 runs of joint, ge, boostnet, metagf on msdnet-tiny and digits")


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_shipped_recipe_is_valid_and_so_is_its_copy(name, cli):
    assert cli("recipes", "copy", name, "copy.toml")[0] == 0
    before = files()
    code, printed, errors = cli("recipes", "validate", "copy.toml")
    assert code == 0 and printed.startswith("copy.toml is valid: "), errors
    assert files() == before


def test_validate_names_every_bad_key_in_one_line(cli):
    Path("bad.toml").write_text('epoch = 1\nmethods = ["ge"]\nbacth_size = 3\nlrate = 1\n[swep]\nlr = [1]\n')
    says = ["'epoch'; did you mean epochs", "'bacth_size'; did you mean batch_size", "'lrate'", "'swep'; did you mean"]
    cli("recipes", "validate", "bad.toml").refused(*says)


def test_validate_names_every_bad_key_of_every_part_in_one_line(cli):
    Path("bad.toml").write_text("tilte = 'x'\n[[parts]]\nepoch = 1\n[[parts]]\nbacth_size = 3\n")
    cli("recipes", "validate", "bad.toml").refused("'tilte'", "'epoch'", "'bacth_size'")


WRONG = {
    "no toml": ("epochs = = 1", "bad.toml is not valid toml"),
    "seeds": ("seeds = 0", "seeds is 0; expected at least 1"),
    "seeds of text": ("seeds = 'two'", "seeds is 'two'; expected integer"),
    "run's values": ("epochs = 'many'\nlr = -1", "epochs is 'many'; expected a valid integer"),
    "run's other values": ("epochs = 'many'\nlr = -1", "lr is -1; expected greater than 0"),
    "method": ("methods = ['bostnet']", "unknown method 'bostnet'; did you mean boostnet"),
    "network": ("backbone = 'msdnet-tinny'", "did you mean msdnet-tiny"),
    "data": ("dataset = ['digits', 'cifar11']", "did you mean cifar10"),
    "field": ("methods = [{name = 'boostnet', temprature = 1}]", "'temprature'; did you mean temperature"),
    "field's value": ("methods = [{name = 'boostnet', temperature = -1}]", "at least 0"),
    "set field": ("methods = 'ge'\nset = {temprature = 1}", "unknown field of joint, ge or their network and data"),
    "sweep field": ("methods = 'boostnet'\nsweep = {temprature = [1]}", "'temprature'; did you mean temperature"),
    "sweep field of others": ("methods = 'ge'\nsweep = {temperature = [1]}", "'temperature'"),
    "sweep value": ("methods = 'boostnet'\nsweep = {temperature = [0.5, 'warm']}", "temperature is 'warm'"),
    "sweep without a list": ("sweep = {lr = 1}", "sweep is {'lr': 1}"),
    "table": ("published = 'boostnet/tabel1'", "unknown published table 'boostnet/tabel1'; did you mean boostnet/"),
    "tables": ("published = ['boostnet/table1', 'imta/table99']", "unknown published table 'imta/table99'"),
    "figure": ("figures = ['toi']", "unknown figure 'toi'; did you mean toy?"),
    "report": ("report = {cots = 'macs'}", "unknown field of report 'cots'; did you mean cost"),
    "part": ("[[parts]]\nmethods = 'ge'\n[[parts]]\nseeds = 0", "seeds is 0; expected at least 1"),
    "part's field": ("[[parts]]\nmethods = 'ge'\nset = {temprature = 1}", "'temprature'"),
    "parts of parts": ("[[parts]]\nparts = []", "a part has parts; expected all parts at the top level"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_validate_refuses_what_is_wrong_in_one_line_and_writes_nothing(mistake, cli):
    text, says = WRONG[mistake]
    Path("bad.toml").write_text(text)
    before = files()
    cli("recipes", "validate", "bad.toml").refused(says)
    assert files() == before
