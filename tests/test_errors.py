"""The table of a user's mistakes: each gets one clear line and exit code 2, and nothing is half-written or lost."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import exitkit
from exitkit.errors import UserError
from exitkit.training.checkpoint import Checkpoints

from toy import FEW, FEW_OPTIONS

TABLE = {
    # mistake: command line, what the line has to say
    "command": ("trian", "unknown command 'trian'; did you mean train?"),
    "option": ("train --methd ge", "--methd"),
    "not a number": ("train --epochs ten", "'ten' is not a valid integer"),
    "method": ("train --method bostnet", "unknown method 'bostnet'; did you mean boostnet"),
    "method part": ("train --method ge+metgf", "did you mean metagf"),
    "slot": ("train --method metagf+metagf", "names a part twice"),
    "backbone": ("train --backbone msdnet-tinny", "did you mean msdnet-tiny"),
    "data set": ("train --dataset cifar11", "did you mean cifar10"),
    "recipe name": ("train --recipe digts", "unknown recipe 'digts'; did you mean digits"),
    "recipe of a comparison": ("train --recipe digits", "use it with: exitkit compare --recipe digits"),
    "field": ("train --method boostnet --set temprature=1", "did you mean temperature"),
    "field of no method": ("compare --methods ge --set temperature=1", "unknown field"),
    "set without =": ("train --set temperature", "is not of the form field=value"),
    "set twice": ("train --method boostnet --set temperature=1 --set temperature=2", "twice"),
    "field out of range": ("train --method boostnet --set temperature=-1", "at least 0"),
    "network too large": ("cost --set channels=10000000000000", "msdnet-tiny does not fit into memory"),
    "number too large": ("cost --num-classes 1" + 30 * "0", "msdnet-tiny does not fit into memory"),
    "recipe that is no text": ("recipes copy /bin/sh mine.toml", "recipe /bin/sh is not a text file; expected TOML"),
    "field of a wrong type": (
        "train --method boostnet --set temperature=warm",
        "temperature is 'warm'; expected number | number, ...",
    ),
    "field of no such choice": ("train --method ge --set variant=new", "variant is 'new'; expected paper | released"),
    "field of no number": ("train --method metagf --set fusion_lr=nan", "fusion_lr is 'nan'; expected number"),
    "field of the backbone": ("train --set backbone.growht=6", "'growht'; did you mean growth"),
    "nothing after the =": ("train --set growth=", "growth is ''; expected integer"),
    "list of a wrong length": ("train --method boostnet --set temperature=1,2", "expected one, or 4 (one per exit)"),
    "weights of a wrong length": ("train --set weights=1,2", "expected 4, one per exit"),
    "all weights zero": ("train --set weights=0,0,0,0", "at least one above 0"),
    "network of no sense": ("train --set growth=3 --set growth_factors=1,1,1 --set bottleneck_factors=1,1,1", "odd"),
    "validation too large": ("train --set validation=1290", "a validation set of 1,290 images can't be drawn"),
    "no validation": ("train --set validation=0", "validation is 0; expected at least 1"),
    "epochs": ("train --epochs 0", "epochs is 0; expected greater than or equal to 1"),
    "learning rate": ("train --lr -1", "lr is -1.0; expected greater than 0"),
    "learning rate nan": ("train --lr nan", "lr is nan; expected a finite number"),
    "batch of one": ("train --batch-size 1", "batch_size is 1; expected greater than or equal to 2"),
    "batch larger than the data": ("train --batch-size 1098", "larger than the 1097 training images"),
    "seed": ("train --seed -1", "seed is -1"),
    "threads": ("train --threads 0", "threads is 0"),
    "threads beyond reason": ("train --threads 100000", "threads is 100000; expected less than or equal to 1024"),
    "seeds": ("compare --seeds 0", "seeds is 0; expected at least 1"),
    "jobs": ("compare --jobs 0", "--jobs is 0; expected at least 1"),
    "no methods": ("compare --methods ,", "methods is empty"),
    "precision": ("train --precision fp8", "precision is 'fp8'; expected 'auto', 'fp32'"),
    "device": ("train --device gpu", "device is 'gpu'; expected auto, cpu, cuda"),
    "precision of another device": ("train --precision tf32 --device cpu", "tf32 needs a CUDA device"),
    "data folder missing": ("train --dataset cifar100 --data-dir nowhere --recipe here.toml", "CIFAR-100 "),
    "image folder not given": ("train --dataset folder", "expected --data-dir DIR"),
    "image folder missing": ("train --dataset folder --data-dir nowhere", "is not a folder"),
    "image folder empty": ("train --dataset folder --data-dir empty", "has 0 class folders"),
    "class without images": ("train --dataset folder --data-dir hollow", "holds no images"),
    "classes differ": ("train --dataset folder --data-dir uneven", "not in both: bird"),
    "recipe file missing": ("train --recipe nowhere.toml", "can't be read"),
    "recipe file of bytes": ("train --recipe bytes.toml", "is not valid toml"),
    "recipe file of a list": ("train --recipe list.json", "contains a list; expected a table of keys"),
    "recipe file with a field of no such name": (
        "train --recipe fields.toml",
        "'temprature'; did you mean temperature",
    ),
    "recipe file with truth for a number": ("train --recipe truth.toml", "epochs is True"),
    "recipe folder without a run": ("train --recipe empty", "empty/recipe.json can't be read"),
    "recipe file broken": ("train --recipe broken.toml", "is not valid toml"),
    "recipe file with bad keys": ("train --recipe keys.toml", "'epoch'; did you mean epochs?"),
    "recipe file with all bad keys named": ("train --recipe keys.toml", "'lrate'"),
    "recipe file with bad values": ("train --recipe values.toml", "epochs is 'many'; expected a valid integer"),
    "milestones": ("train --recipe milestones.toml", "ascending shares"),
    "comparison's seeds": ("compare --recipe seeds.toml", "seeds is 'two'; expected integer"),
    "out is a file": ("train --epochs 1 --out broken.toml", "broken.toml is a file; expected a folder"),
    "out is a device": ("train --epochs 1 --out /dev/null", "/dev/null is a file; expected a folder"),
    "out in no real file system": ("train --epochs 1 --out /proc/runs", "/proc/runs can't be written"),
    "out can't be made": ("train --epochs 1 --out broken.toml/deeper", "can't be written"),
    "out of a name too long": (f"train --epochs 1 --out {'x' * 300}", "can't be accessed"),
    "comparison with a name too long": (f"compare --epochs 1 --out {'x' * 300}", "can't be accessed"),
    "key of a recipe": (
        "train --set seed=1",
        "seed is a key of a recipe, not a field; set seed",
    ),
    "optimiser that does not exist": ("train --set optimizer=adam", "optimizer is 'adam'; expected sgd | adamw"),
    "decay of an average": ("train --set weight_ema=1", "weight_ema is 1.0; expected"),
    "pseudo steps of AdamW": ("train --method l2w --set optimizer=adamw", "pseudo steps are steps of SGD"),
    "mixed images with one label": ("train --method ge+cgt --set mixup=1", "cgt: its gates need one label per image"),
    "average of fused weights": ("train --method metagf --set weight_ema=0.9", "the fusion, not the optimiser"),
    "rate of a fixed trunk": ("train --method heads --set trunk_lr_factor=0.1", "its trunk is not trained"),
    "mixed images of stored features": ("train --method heads --set cutmix=1", "fixed views of the images"),
    "warm-up without end": ("train --epochs 2 --set warmup=2", "phase train has 2 epochs; expected fewer"),
    "run of a name too long": (f"show {'x' * 300}", "can't be accessed"),
    "no images at all": ("train --data-dir=", "data_dir"),
    "run that is a file": ("show broken.toml", "folder broken.toml is a file"),
    "runs that are a file": ("report broken.toml", "folder broken.toml is a file"),
    "no run": ("show nowhere", "does not exist"),
    "no run in the folder": ("show empty", "holds no run (no recipe.json)"),
    "no runs to report": ("report empty", "holds no finished run"),
    "no folder to report": ("report nowhere", "does not exist"),
    "list of what": ("list methds", "did you mean methods"),
    "image shape": ("cost --input-shape 3,32", "expected channels,height,width"),
    "classes": ("cost --num-classes 1", "num_classes is 1; expected at least 2"),
    "image shape of very many digits": (f"cost --input-shape 3,{'9' * 5000},3", "expected channels,height,width"),
    "image shape beyond reason": ("cost --input-shape 1,2000000000,2000000000", "each 1 to 16384"),
    "value of what has none": ("list backbones msdnet-tiny:junk", "unknown backbone 'msdnet-tiny:junk'"),
    "images beyond reason": (
        "train --dataset folder --data-dir uneven --set image_size=10000000",
        "image_size is 10000000; expected 8 to 8192",
    ),
    "more epochs between probes than epochs": (
        "train --epochs 1 --probe-every 5",
        "probe_every is 5; expected at most 1",
    ),
    "jobs of one process": ("compare --jobs 4 --launcher here", "expected 1 with --launcher here"),
    "hours nan": ("tune --hours nan", "nan is not a finite number"),
    "interval infinite": ("watch empty --interval inf", "--interval"),
    "seconds infinite": ("compare --plan --seconds-per-run inf", "--seconds-per-run"),
    "points of patience": ("report empty --rule patience --points 3", "points has no effect on the rule patience"),
    "baseline of the report": ("compare --recipe reported.toml --plan", "'boostnte'; did you mean boostnet"),
    "figures of a wrong type": ("compare --recipe figures.toml --plan", "figures is 3"),
    "figure beside methods": (
        "compare --recipe toy.toml --plan",
        "figures has toy, which is drawn alone; expected no methods",
    ),
    "search of a sweep": ("tune --recipe swept.toml", "swept.toml has sweep, which a search does not use"),
    "search of methods with settings": ("tune --recipe tables.toml", "tables.toml has methods with settings"),
    "search with a wrong table": ("tune --recipe three.toml", "set is 3"),
    "cost that new runs do not have": ("compare --recipe latency.toml --plan", "latency, which new runs do not have"),
    "folder twice": ("reproducibility empty empty/. --out made.md", "is given twice"),
    "too small an image": ("cost --backbone msdnet-cifar-k7 --input-shape 3,2,2", "too small for 3 scales"),
}


@pytest.fixture
def things(tmp_path):
    """Files and folders that are wrong in the ways that the table needs."""
    texts = {
        "here.toml": "download = false",
        "broken.toml": "epochs = = 1",
        "keys.toml": "epoch = 1\nlrate = 2",
        "values.toml": "epochs = 'many'",
        "milestones.toml": "schedule = 'step'\nmilestones = [0.7, 0.3]",
        "seeds.toml": "seeds = 'two'",
        "fields.toml": "method = 'boostnet'\n[method_settings]\ntemprature = 1",
        "truth.toml": "epochs = true",
        "list.json": "[1, 2]",
        "reported.toml": "methods = 'boostnet'\n[report]\nbaseline = 'boostnte'",
        "toy.toml": "figures = 'toy'\nmethods = 'ge'",
        "swept.toml": "sweep = { lr = [0.1, 0.2] }",
        "tables.toml": "methods = [{ name = 'boostnet', temperature = 0.3 }]",
        "three.toml": "set = 3",
        "figures.toml": "figures = 3",
        "latency.toml": "[report]\ncost = 'latency'",
    }
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for folder in ("empty", "hollow/cat", "hollow/dog"):
        (tmp_path / folder).mkdir(parents=True)
    for place in ("train/cat", "train/dog", "test/cat", "test/dog", "test/bird"):
        (tmp_path / "uneven" / place).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / "uneven" / place / f"{number}.png")


def everything(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("mistake", TABLE)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(mistake, cli, things, tmp_path):
    before = everything(tmp_path)
    command, says = TABLE[mistake]
    cli(*command.split()).refused(says)
    assert everything(tmp_path) == before


def test_ranks_that_torchrun_did_not_start_are_refused(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cli("train", "--epochs", "1").refused(
        "WORLD_SIZE is set but LOCAL_RANK, RANK is not; start several ranks with torchrun"
    )


TRAIN = ("train", "--epochs", "2", *FEW_OPTIONS, "--out", "runs")


@pytest.fixture
def unfinished(cli, monkeypatch, tmp_path):
    """A run that was stopped after its first epoch."""
    save, calls = Checkpoints.save, []

    def stop(self, run, history, **options):
        calls.append(save(self, run, history, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop)
    code, _, errors = cli(*TRAIN)
    assert code == 130 and errors.splitlines()[-1].endswith("--resume")
    monkeypatch.setattr(Checkpoints, "save", save)
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_an_unfinished_run_is_not_overwritten_and_not_mixed_with_other_settings(cli, unfinished, tmp_path):
    before = everything(tmp_path)
    cli(*TRAIN).refused("exists and is unfinished; resume it by --resume")
    cli(*TRAIN, "--resume", "--lr", "0.2").refused("has other settings", "lr=0.1 instead of 0.2")
    cli("evaluate", unfinished).refused("weights.safetensors is missing")
    cli("report", "runs").refused("no finished run")
    assert everything(tmp_path) == before
    recipe = unfinished / "recipe.json"
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"lr": 0.3}))
    cli(*TRAIN, "--resume").refused("do not match its name; choose another --out")


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def _malicious(path):
    torch.save({"network": Malicious()}, path)


def _pickled(path):
    path.write_bytes(pickle.dumps(Malicious()))


def _cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def _foreign(path):
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)


def _text(path):
    path.write_text("not a checkpoint")


def _zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'touch touched'\ntR.")


def _of_another_network(path):
    state = torch.load(path, weights_only=True)
    state["network"] = {name: value for name, value in state["network"].items() if "stages.2" not in name}
    torch.save(state, path)


@pytest.mark.parametrize("damage", [_malicious, _pickled, _cut, _foreign, _text, _zipped, _of_another_network])
def test_a_foreign_or_damaged_checkpoint_is_refused_and_never_executed(damage, cli, unfinished, tmp_path):
    damage(unfinished / "checkpoint.pt")
    before = everything(tmp_path)
    cli(*TRAIN, "--resume").refused("checkpoint.pt", "delete it to start")
    assert everything(tmp_path) == before
    assert not Path("touched").exists()
    (unfinished / "checkpoint.pt").unlink()
    assert cli(*TRAIN, "--resume")[0] == 0


def test_a_run_that_diverges_says_where_and_keeps_the_last_good_checkpoint(cli, unfinished, tmp_path, monkeypatch):
    good = (unfinished / "checkpoint.pt").read_bytes()
    original = exitkit.TrainingStrategy.exit_losses

    def diverging(self, run, outputs, batch):
        losses = original(self, run, outputs, batch)
        return [loss * float("nan") if run.position.step == 1 and k == 2 else loss for k, loss in enumerate(losses)]

    monkeypatch.setattr(exitkit.TrainingStrategy, "exit_losses", diverging)
    cli(*TRAIN, "--resume").refused("the loss of exit 3 is not finite in epoch 2, step 2")
    assert (unfinished / "checkpoint.pt").read_bytes() == good
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli(*TRAIN, "--resume")[0] == 0


def test_a_learning_rate_that_is_too_high_is_seen_at_once(cli):
    cli("train", "--epochs", "2", "--lr", "1e30").refused(
        "the loss of exit", "is not finite in epoch 1, step 2", "--lr"
    )


@pytest.mark.parametrize("name", ["weights.safetensors", "split.safetensors"])
def test_damaged_files_of_a_finished_run_are_named(name, cli, tmp_path):
    run = exitkit.train({"epochs": 1, **FEW}, "runs")
    (run.path / name).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    cli("evaluate", run.path).refused(name)
    (run.path / name).unlink()
    cli("evaluate", run.path).refused(name, "missing")


def test_damaged_results_are_named(cli, tmp_path):
    run = exitkit.train({"epochs": 1, **FEW}, "runs")
    damages = [("results.json", "{", ("show", run.path)), ("outputs-test.safetensors", "{}", ("report", "runs"))]
    damages += [("recipe.json", "[]", ("show", run.path))]
    for name, content, command in damages:
        whole = (run.path / name).read_bytes()
        (run.path / name).write_text(content)
        cli(*command).refused(name)
        (run.path / name).write_bytes(whole)


@pytest.mark.parametrize(
    "words",
    [
        "cost --set num_classes=3",
        "cost --set name=foo",
        "cost --input-shape ²,1,1",
        "cost --backbone msdnet --set blocks=1 --set base=1 --set prune=min",
        "train --backbone sdn-tiny --set exits=none",
        "train --method separate+isc",
        "train --method isc+separate --set order=branch",
    ],
)
def test_values_that_once_were_tracebacks_or_no_error_are_one_line(cli, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli(*words.split())
    assert result.code == 2 and result.errors.startswith("exitkit: ") and len(result.errors.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_rank_that_is_no_number_is_one_line(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "abc")
    result = cli("train", "--out", str(tmp_path))
    assert result.code == 2 and "Traceback" not in result.errors, result.errors


def test_a_field_given_twice_with_blanks_is_refused(cli):
    result = cli("cost", "--set", "blocks=4", "--set", " blocks=2")
    assert result.code == 2 and "gives 'blocks' twice" in result.errors


def test_names_of_arguments_as_settings_of_a_recipe_are_unknown_fields():
    with pytest.raises(UserError, match="unknown field of method kd 'name'"):
        exitkit.Recipe.make(method="kd", method_settings={"name": "x"}).resolve()


def test_a_run_given_by_its_own_folder_has_its_name(cli, tmp_path, monkeypatch):
    run = exitkit.train({"method": "joint", "epochs": 1, **FEW}, tmp_path)
    monkeypatch.chdir(run.path)
    shown = cli("show", ".")
    assert shown.code == 0 and run.path.name in shown.out
