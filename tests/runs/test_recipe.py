"""What a run is: recipes, their files, their identity."""

import functools
import json
import shutil

import pytest

import exitkit
from exitkit import Recipe, plugins
from exitkit.cli.catalogue import entries, recipe_files
from exitkit.cli.options import make_recipe
from exitkit.errors import Note, UserError
from exitkit.files import load_tensors, save_tensors
from exitkit.plugins import check_value, type_name
from exitkit.runs.job import check_effects
from exitkit.runs.recipe import EXECUTION


def test_resolving_fills_in_the_house_recipe_and_every_field():
    recipe = Recipe.make(method="boostnet").resolve()
    assert (recipe.backbone, recipe.epochs, recipe.batch_size, recipe.lr) == ("msdnet-tiny", 30, 64, 0.1)
    assert recipe.schedule == "cosine" and recipe.milestones == ()
    assert recipe.method_settings == {
        "variant": "paper",
        "temperature": 0.5,
        "stop_gradient": True,
        "rescale": True,
        "ge_scope": "all",
        "label_smoothing": 0.0,
    }
    assert recipe.backbone_settings["growth_factors"] == [1, 1, 2]
    assert recipe.resolve() == recipe and recipe.resolve().id == recipe.id
    cifar = Recipe.make(dataset="cifar100").resolve()
    assert (cifar.epochs, cifar.schedule, cifar.milestones) == (300, "step", (0.5, 0.75))


def test_the_id_changes_with_everything_that_changes_the_run_and_with_nothing_else():
    base = Recipe.make().resolve()
    changes = {
        "seed": 1,
        "epochs": 31,
        "batch_size": 32,
        "lr": 0.2,
        "momentum": 0.8,
        "weight_decay": 0.0,
        "precision": "bf16",
        "layout": "channels-last",
        "schedule": "constant",
        "method": "ge",
        "backbone": "msdnet-cifar-lg4",
    }
    steps = {"schedule": "step", "milestones": (0.5,)}
    ids = [Recipe.make(**steps, **more).resolve().id for more in ({}, {"decay": 0.2})]
    ids += [base.id, *(Recipe.make(**{key: value}).resolve().id for key, value in changes.items())]
    ids += [
        Recipe.make().with_settings({name: value}).resolve().id for name, value in (("growth", 6), ("validation", 100))
    ]
    assert len(set(ids)) == len(ids)
    assert "layout" not in base.identity()  # ids of earlier releases
    folder = Recipe.make(dataset="folder")
    assert folder.with_settings({"workers": 9}).resolve().id == folder.resolve().id
    assert folder.with_settings({"image_size": 9}).resolve().id != folder.resolve().id
    where = {"device": "cpu", "threads": 2, "data_dir": "elsewhere", "download": False, "init_from": None}
    where |= {"tensorboard": True, "compile": True, "deterministic": False}
    assert where.keys() == EXECUTION
    assert all(Recipe.make(**{key: value}).resolve().id == base.id for key, value in where.items())


def test_a_written_recipe_is_the_recipe_that_is_read(tmp_path):
    recipe = Recipe.make(method="boostnet", method_settings={"temperature": (0.1, 0.2, 0.3, 0.4)}).resolve()
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    again = Recipe.make(**Recipe.read(path))
    assert again == recipe and again.resolve().id == recipe.id


def test_another_method_than_the_recipes_does_not_get_its_settings():
    run = json.loads(Recipe.make(method="boostnet").resolve().model_dump_json())
    with pytest.warns(Note, match=r"^the recipe's settings of boostnet are not used with ge$"):
        other = make_recipe(run, {"method": "ge", "backbone": None})
    assert other.resolve().method_settings == Recipe.make(method="ge").resolve().method_settings
    assert make_recipe(run, {"method": "boostnet"}).method_settings["temperature"] == 0.5


def test_other_initial_weights_than_the_recipes_have_their_own_digest():
    recipe = make_recipe({"init_from": "a.pth", "init_weights": "0123"}, {"init_from": "b.pth"})
    assert recipe.init_from == "b.pth" and recipe.init_weights is None


def test_fields_find_their_home():
    recipe = Recipe.make(method="boostnet").with_settings(
        {"temperature": "0.3", "backbone.growth": "8", "validation": "150", "method.rescale": "no"}
    )
    assert recipe.method_settings == {"temperature": "0.3", "rescale": "no"}
    resolved = recipe.resolve()
    assert resolved.method_settings["temperature"] == 0.3 and resolved.method_settings["rescale"] is False
    assert resolved.backbone_settings["growth"] == 8 and resolved.dataset_settings["validation"] == 150
    composed = Recipe.make(method="ge+boostnet").with_settings({"ge.variant": "released"}).resolve()
    assert composed.method_settings["ge.ge_scope"] == "coarsest"
    assert composed.method_settings["boostnet.ge_scope"] == "all"


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (tuple[int, ...], "1,2,4", (1, 2, 4)),
        (tuple[int, ...], "1-2-4", (1, 2, 4)),
        (tuple[float, ...] | None, "none", None),
        (float | tuple[float, ...], "0.5", 0.5),
        (float | tuple[float, ...], "1e-3,2e-3", (0.001, 0.002)),
        (float, "-1", -1.0),
        (bool, "true", True),
        (bool, "0", False),
        (int | None, "7", 7),
    ],
)
def test_text_is_read_as_the_fields_type(kind, text, value):
    assert check_value("x", kind, text) == value


def test_text_that_is_no_such_thing_says_what_was_expected():
    with pytest.raises(UserError, match=r"x is .a,b.; expected number, ..."):
        check_value("x", tuple[float, ...], "a,b")
    assert type_name(float | tuple[float, ...]) == "number | number, ..."


def test_the_catalogue_names_every_shipped_recipe_with_its_title():
    shipped = {entry["name"]: entry["summary"] for entry in entries("recipes")}
    assert shipped.keys() == set(recipe_files()) and all(shipped.values())


@pytest.mark.parametrize(("name", "text"), [("r.toml", 'method = "ge"\n'), ("r.json", '{"method": "ge"}')])
def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert Recipe.read(tmp_path / name) == {"method": "ge"}


def test_a_recipe_that_is_no_table_is_refused(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="contains a list; expected a table of keys"):
        Recipe.read(path)


def test_a_method_that_is_no_longer_installed_hides_no_run(tmp_path, monkeypatch):
    from exitkit.benchmarks.report import collect

    from toy import FEW

    run = exitkit.train({"method": "joint", "epochs": 1, **FEW}, tmp_path)
    gone = tmp_path / "gone"
    shutil.copytree(run.path, gone)
    recipe = json.loads((gone / "recipe.json").read_text())
    recipe |= {"method": "someones", "method_settings": {"strength": 3}, "backbone": "theirs"}
    (gone / "recipe.json").write_text(json.dumps(recipe))
    folder = exitkit.RunFolder(gone)
    assert folder.identity["method.strength"] == "3"
    assert set(exitkit.load_runs(tmp_path).method) == {"joint", "someones"}
    assert set(collect(exitkit.find_runs(tmp_path)).anytime.method) == {"joint", "someones"}


def test_added_and_removed_settings_leave_the_identity_of_earlier_runs(monkeypatch):
    from exitkit import plugins

    l2w = Recipe.make(method="l2w").resolve()
    assert "gradient" not in l2w.method_settings and l2w.identity()["method_settings"]["gradient"] == "forward"
    earlier = l2w.with_values(method_settings=l2w.method_settings | {"gradient": "forward"})
    assert earlier.identity() == l2w.identity() and earlier.id == l2w.id
    composed = Recipe.make(method="ge+l2w").resolve()
    assert composed.identity()["method_settings"]["l2w.gradient"] == "forward"
    assert plugins.identifying("method", "metagf", {"branches": "side-by-side", "ema": 0.0}) == {"ema": 0.0}


def test_what_a_run_takes_from_another_is_in_its_identity(tmp_path):
    from toy import FEW

    teacher = exitkit.train({"method": "joint", "epochs": 1, **FEW}, tmp_path)
    recipe = {"method": "kd", "method_settings": {"teacher": str(teacher.path)}, **FEW}
    first = Recipe.make(**recipe).resolve()
    assert list(first.ingredients) == [str(teacher.path)] and first.identity()["ingredients"] == first.ingredients
    assert "ingredients" not in Recipe.make(method="kd").resolve().identity()
    weights = teacher.path / "weights.safetensors"
    other = exitkit.train({"method": "joint", "epochs": 1, "seed": 1, **FEW}, tmp_path)
    tensors = load_tensors(other.path / "weights.safetensors")
    save_tensors(weights, tensors, teacher.name)
    assert Recipe.make(**recipe).resolve().id != first.id
    with pytest.raises(UserError, match="have changed since this run was planned"):
        exitkit.train(first, tmp_path / "pupils")


@pytest.mark.parametrize("name", ["deep.json", "deep.toml"])
def test_a_recipe_that_is_nested_too_deeply_is_refused_by_its_key(name, tmp_path):
    value = "[" * 30 + "]" * 30
    (tmp_path / name).write_text(
        f'{{"method_settings": {value}}}' if name == "deep.json" else f"method_settings = {value}"
    )
    with pytest.raises(UserError, match="method_settings is nested more than 20 levels deep"):
        Recipe.read(tmp_path / name)


WITHOUT_EFFECT = [
    ("l2w", {"weights": "fixed", "epsilon": 0.1}, "epsilon has no effect without weights=predicted or frozen"),
    ("l2w", {"weights": "frozen", "interval": 2}, "interval has no effect without weights=predicted;"),
    ("l2w", {"objective": "vanilla", "q": 0.5}, "q has no effect without objective=allocated"),
    ("boostnet", {"rescale": False, "ge_scope": "coarsest"}, "ge_scope has no effect without rescale=true; leave it"),
    ("byot", {"hint_weight": 0, "skip_deepest": True}, "skip_deepest has no effect without hint_weight above 0"),
    ("beed", {"hint_weight": 0, "hints": "maps"}, "hints has no effect without hint_weight above 0"),
    ("nashmtl", {"size": "sum"}, "size has no effect without a direction that has the length of a mean"),
    ("cgt", {"sharpness": 10}, "sharpness has no effect without gate=soft"),
    ("bdl", {"groups": (1, 2), "window": 1}, "window has no effect without groups=none"),
    ("isc", {"path": "none", "isc_detach": False}, "isc_detach has no effect without path=learned or identity"),
    ("ge+hdkd", {"hdkd.learn": False, "hdkd.meta_lr": 1.0}, r"hdkd\.meta_lr has no effect without learn=true"),
    ("heads+ztw", {"heads_lr": 0.5}, r"ztw\.heads_lr has no effect without the phases of ztw, which another method re"),
    ("imta", {"second": "isc", "gamma": 0.9}, "gamma has no effect without ofa in first or second"),
    ("imta", {"second": "none", "ratio": 0.3}, "ratio has no effect without a second phase"),
]


@pytest.mark.parametrize(("method", "settings", "says"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused_in_a_new_run_and_at_its_default_it_is_none(method, settings, says):
    with pytest.raises(UserError, match=says):
        check_effects(Recipe.make(method=method, method_settings=settings))
    changed = list(settings)[-1]
    kept = {key: value for key, value in settings.items() if key != changed}
    resolved = Recipe.make(method=method, method_settings=kept).resolve()
    check_effects(resolved)  # with every default written down


def test_values_of_the_schedule_without_effect_are_refused_in_a_new_run():
    for alone in ({"decay": 0.2}, {"milestones": (0.5,)}):
        with pytest.raises(UserError, match=rf"{next(iter(alone))} has no effect without schedule=step; leave it out"):
            check_effects(Recipe.make(**alone))
        check_effects(Recipe.make(dataset="cifar100", **alone))
    with pytest.raises(UserError, match="schedule=step has no milestones; expected shares of the epochs"):
        check_effects(Recipe.make(schedule="step"))


def test_a_begun_run_with_a_setting_without_effect_goes_on(tmp_path, monkeypatch):
    recipe = {"method": "cgt", "epochs": 1, "batch_size": 32, "dataset_settings": {"per_class": 8, "validation": 40}}
    monkeypatch.setattr("exitkit.training.loop.check_effects", lambda recipe: None)  # as an earlier release
    run = exitkit.train({**recipe, "method_settings": {"sharpness": 3.0}}, tmp_path)
    monkeypatch.undo()
    assert exitkit.train({**recipe, "method_settings": {"sharpness": 3.0}}, tmp_path).path == run.path
    with pytest.raises(UserError, match="sharpness has no effect"):
        exitkit.train({**recipe, "method_settings": {"sharpness": 4.0}}, tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_a_preset_may_have_defaults_without_effect(monkeypatch):
    fixed = functools.partial(plugins.load("method", "l2w"), weights="fixed", epsilon=0.3)
    exitkit.register("method", "l2w-fixed", fixed)
    check_effects(Recipe.make(method="l2w-fixed").resolve())
    with pytest.raises(UserError, match="epsilon has no effect without weights=predicted or frozen"):
        check_effects(Recipe.make(method="l2w-fixed", method_settings={"epsilon": 0.4}))


def test_a_setting_that_needs_another_says_so_in_its_meaning():
    assert plugins.fields(plugins.load("method", "cgt"))["sharpness"].metadata["meaning"].endswith(" (with gate=soft)")
