"""What a comparison's recipe stands for: which runs, in which order, and how long they take."""

import itertools
import json
from importlib.metadata import entry_points

import pytest

import exitkit
from exitkit import Recipe
from exitkit.benchmarks.campaign import estimate as estimates
from exitkit.benchmarks.campaign import launchers, usable
from exitkit.benchmarks.campaign.estimate import Estimate, Step, Timing, in_words, wall_time
from exitkit.benchmarks.campaign.plan import Plan
from exitkit.benchmarks.commands.compare import _values
from exitkit.data.describe import describe, describe_catalogued
from exitkit.engine import memory
from exitkit.errors import Note, UserError
from exitkit.networks.build import build_network
from exitkit.plugins import configure
from exitkit.runs import job

PLAIN = {"epochs": 1, "seeds": 1, "methods": "ge", "backbone": "msdnet-tiny", "dataset": "digits"}


def planned(**values):
    return [each.recipe for each in Plan.make(PLAIN | values).runs()]


def have(recipes, *names):
    """These of each recipe's values; `method.field` and the like are fields."""
    found = []
    for recipe in recipes:
        row = []
        for name in names:
            kind, dot, field = name.partition(".")
            row.append(getattr(recipe, f"{kind}_settings").get(field) if dot else getattr(recipe, name))
        found.append(tuple(row) if len(row) > 1 else row[0])
    return found


def test_lists_of_data_networks_methods_and_seeds_multiply_in_this_order():
    networks, data = ["ranet-tiny", "msdnet-tiny"], ["fashion-mnist", "digits"]
    runs = planned(backbone=networks, dataset=data, methods=["kd", "ge"], seeds=2, seed=5)
    expected = list(itertools.product(data, networks, ["joint", "kd", "ge"], [5, 6]))
    assert have(runs, "dataset", "backbone", "method", "seed") == expected
    assert len({run.id for run in runs}) == 24


def test_what_is_named_twice_is_run_once():
    twice = planned(methods="ge,joint,ge", backbone=["msdnet-tiny", "msdnet-tiny"], sweep={"batch_size": [64, 32, 64]})
    assert have(twice, "method", "batch_size") == list(itertools.product(["joint", "ge"], [64, 32]))
    # A default that is said is the default.
    assert len(planned(methods=["boostnet", {"name": "boostnet", "temperature": 0.5}])) == 2


def test_the_baseline_comes_first_and_is_always_there():
    assert have(planned(methods="ge,kd"), "method") == ["joint", "ge", "kd"]
    assert have(planned(methods="ge,joint,kd"), "method") == ["joint", "ge", "kd"]
    assert have(planned(methods="ge,kd", baseline="kd"), "method") == ["kd", "ge"]
    assert have(planned(methods="ge,kd", baseline="ge+kd"), "method") == ["ge+kd", "ge", "kd"]
    weighted = {"name": "joint", "weights": [1.0, 2.0, 3.0, 4.0]}
    assert have(planned(methods=["ge", weighted]), "method", "method.weights")[0] == ("joint", [1.0, 2.0, 3.0, 4.0])
    assert len(planned(methods=["ge", weighted])) == 2


def test_by_default_there_are_four_methods_and_two_seeds():
    runs = Plan.make({}).runs()
    methods = ["joint", "ge", "boostnet", "metagf"]
    assert have([run.recipe for run in runs], "method", "seed") == list(itertools.product(methods, [0, 1]))


def test_all_is_every_method_that_can_be_had_here(monkeypatch, capsys):
    def without_kd(kind, name, values):
        if name == "kd":
            raise UserError("kd needs what is not here")
        return configure(kind, name, values)

    monkeypatch.setattr(usable, "configure", without_kd)
    names = [point.name for point in entry_points(group="exitkit.methods")]
    able = {name for name in names if name != "kd"}
    for methods in ("all", ["all"]):
        found = have(planned(methods=methods), "method")
        assert found[0] == "joint" and len(found) == len(able) and set(found) == able
        assert "skipped kd: kd needs what is not here" in capsys.readouterr().err


def test_a_method_may_be_a_table_with_fields_its_own_and_a_runs():
    methods = ["ge", {"name": "boostnet", "temperature": 0.2, "batch_size": 32, "lr": 0.05}]
    runs = planned(methods=methods, batch_size=128)
    names = ("method", "method.temperature", "batch_size", "lr")
    assert have(runs, *names) == [("joint", None, 128, 0.1), ("ge", None, 128, 0.1), ("boostnet", 0.2, 32, 0.05)]


def test_networks_and_data_may_be_tables_with_fields_and_what_they_stand_for():
    network = {"name": "msdnet-tiny", "growth": 2, "lr": 0.2, "stands_for": "msdnet-cifar-k7"}
    data = {"name": "digits", "validation": 100, "stands_for": "cifar100"}
    runs = Plan.make(PLAIN | {"backbone": [network, "ranet-tiny"], "dataset": [data]}).runs()
    rows = have([run.recipe for run in runs], "backbone", "backbone.growth", "lr", "dataset.validation")
    assert rows[0] == rows[1] == ("msdnet-tiny", 2, 0.2, 100)
    assert rows[2][0] == "ranet-tiny" and rows[2][2:] == (0.1, 100)
    both = {"backbone": "msdnet-cifar-k7", "dataset": "cifar100"}
    assert [dict(run.stands_for) for run in runs] == [both, both, {"dataset": "cifar100"}, {"dataset": "cifar100"}]
    assert len({run.recipe.id for run in runs}) == 4


def test_set_is_for_every_method_with_such_a_field_and_more_so_for_the_one_that_is_named():
    runs = planned(methods="boostnet,kd,ge", set={"temperature": 0.7, "boostnet.temperature": 0.3, "kd.lr": 0.2})
    expected = [("joint", None, 0.1), ("boostnet", 0.3, 0.1), ("kd", 0.7, 0.2), ("ge", None, 0.1)]
    assert have(runs, "method", "method.temperature", "lr") == expected
    assert have(planned(set={"ge.epochs": 3, "epochs": 2}), "method", "epochs") == [("joint", 2), ("ge", 3)]


def test_the_named_method_goes_before_in_any_order():
    runs = planned(methods="boostnet", set={"boostnet.temperature": 0.3, "temperature": 0.7})
    assert have(runs, "method.temperature") == [None, 0.3]


def test_a_sweep_leaves_methods_without_the_field_with_one_run():
    runs = planned(methods="ge,boostnet", sweep={"temperature": [0.0, 0.5, 1.0]})
    expected = [("joint", None), ("ge", None), *(("boostnet", value) for value in (0.0, 0.5, 1.0))]
    assert have(runs, "method", "method.temperature") == expected
    runs = planned(methods="kd,boostnet", sweep={"boostnet.temperature": [0.0, 1.0]}, set={"temperature": 0.25})
    expected = [("joint", None), ("kd", 0.25), ("boostnet", 0.0), ("boostnet", 1.0)]
    assert have(runs, "method", "method.temperature") == expected


def test_a_sweep_of_a_named_method_goes_before():
    sweep = {"boostnet.temperature": [0.0, 1.0], "temperature": [0.25]}
    runs = planned(methods="kd,boostnet", sweep=sweep)
    expected = [("joint", None), ("kd", 0.25), ("boostnet", 0.0), ("boostnet", 1.0)]
    assert have(runs, "method", "method.temperature") == expected


@pytest.mark.parametrize(("key", "swept"), [("temperature", "temperature"), ("boostnet.temperature", "temperature")])
def test_a_value_that_a_sweep_would_replace_is_refused(key, swept):
    with pytest.raises(UserError, match=f"^{key}.* is given by --set and by --sweep"):
        planned(methods="boostnet", sweep={swept: [0.0, 1.0]}, set={key: 0.25})


def test_sweeps_over_fields_of_method_run_network_and_data_combine():
    sweep = {"temperature": [0.0, 1.0], "batch_size": ["32", 64], "growth": [2, 4], "imbalance": [1.0, 10.0]}
    runs = planned(methods="boostnet", sweep=sweep, seeds=2)
    names = ("method.temperature", "batch_size", "backbone.growth", "dataset.imbalance", "seed")
    boostnet = have([run for run in runs if run.method == "boostnet"], *names)
    assert boostnet == list(itertools.product([0.0, 1.0], [32, 64], [2, 4], [1.0, 10.0], [0, 1]))
    joint = have([run for run in runs if run.method == "joint"], *names[1:])
    assert joint == list(itertools.product([32, 64], [2, 4], [1.0, 10.0], [0, 1]))
    assert len(runs) == 48 and runs[0].method == "joint"


@pytest.mark.parametrize("key", ["set", "sweep"])
@pytest.mark.parametrize(
    ("field", "near"),
    [("temprature", "temperature"), ("boostnet.temprature", "boostnet.temperature"), ("bacth_size", "batch_size")],
)
def test_a_field_that_nothing_has_is_refused_with_the_nearest_name(key, field, near):
    plan = Plan.make(PLAIN | {"methods": "ge,boostnet", key: {field: [1] if key == "sweep" else 1}})
    with pytest.raises(UserError) as error:
        plan.runs()
    assert f"{field!r}; did you mean {near}" in str(error.value)


def test_static_adds_each_exit_trained_for_itself_alone():
    runs = planned(static=True, backbone=["msdnet-tiny", {"name": "msdnet-tiny", "blocks": 2}])
    single = [[float(place == own) for place in range(4)] for own in range(4)]
    assert have(runs[:6], "method", "method.weights")[2:] == [("joint", row) for row in single]
    assert have(runs[6:], "method.weights") == [None, None, [1.0, 0.0], [0.0, 1.0]]
    assert len({run.id for run in runs}) == 10


@pytest.mark.parametrize("given", [{"set": {"weights": [1, 1, 2, 2]}}, {"sweep": {"weights": [[1, 1, 2, 2]]}}])
def test_static_runs_keep_their_weights(given):
    assert [0.0, 0.0, 1.0, 0.0] in have(planned(static=True, **given), "method.weights")


def test_static_runs_fit_the_network_that_a_sweep_makes():
    for run in planned(static=True, sweep={"blocks": [2, 4]}):
        weights = run.method_settings.get("weights")
        assert weights is None or len(weights) == build_network(run.backbone, **run.backbone_settings).num_exits


def test_parts_are_taken_together_each_over_what_stands_above():
    parts = [{"methods": "boostnet", "batch_size": 32}, {"epochs": 2}, {}, {"methods": "kd", "batch_size": 32}]
    runs = planned(parts=parts, batch_size=128)
    expected = [("joint", 1, 32), ("boostnet", 1, 32), ("joint", 2, 128), ("ge", 2, 128), ("joint", 1, 128)]
    expected += [("ge", 1, 128), ("kd", 1, 32)]
    assert have(runs, "method", "epochs", "batch_size") == expected


def test_set_above_the_parts_is_for_those_that_have_the_field():
    runs = planned(parts=[{"methods": "boostnet"}, {"methods": "ge"}], set={"temperature": 0.25})
    assert have(runs, "method.temperature") == [None, 0.25, None]


def test_the_command_line_goes_before_the_recipe_and_its_parts():
    recipe = {"epochs": 30, "seeds": 5, "methods": ["ge"], "static": True, "set": {"lr": 0.3, "momentum": 0.5}}
    recipe |= {"parts": [{"epochs": 9, "methods": ["boostnet"], "set": {"lr": 0.4}}, {"backbone": "ranet-tiny"}]}
    given = {"epochs": 2, "seeds": None, "static": None, "methods": "kd", "backbone": "msdnet-tiny, ranet-tiny"}
    values = _values(recipe, given, {"lr": "0.5"}, {"batch_size": ["32", "64"]})
    assert values["seeds"] == 5 and values["static"] is True and values["set"] == {"lr": "0.5", "momentum": 0.5}
    runs = [each.recipe for each in Plan.make(values | {"seeds": 1, "static": False}).runs()]
    rows = have(runs, "backbone", "method", "batch_size", "epochs", "lr")
    product = itertools.product(["msdnet-tiny", "ranet-tiny"], ["joint", "kd"], [32, 64], [2], [0.5])
    assert rows[:8] == list(product)
    assert sorted(set(have(runs, "momentum"))) == [0.5, 0.9]  # `set` of a part stands in the place of that above it
    assert recipe["parts"][0] == {"epochs": 9, "methods": ["boostnet"], "set": {"lr": 0.4}}


def test_a_zero_on_the_command_line_is_not_taken_for_nothing():
    assert _values({"lr": 0.1}, {"lr": 0.0, "seeds": 0, "epochs": None}, {}, {}) == {"lr": 0.0, "seeds": 0}


def test_a_part_that_is_no_table_is_refused_on_the_command_line_too():
    with pytest.raises(UserError, match="parts"):
        Plan.make(_values({"parts": ["ge"]}, {}, {}, {}))


BAD = {
    "key": ({"bacth_size": 3}, "unknown key of a recipe 'bacth_size'; did you mean batch_size?"),
    "keys": ({"lrate": 3, "tilte": "x"}, "unknown key of a recipe 'tilte'; did you mean title"),
    "key in a part": ({"parts": [{"sed": 1}]}, "unknown key of a recipe 'sed'"),
    "run's method": ({"method": "ge"}, "method is a key of a run's recipe; expected methods, a list of names"),
    "run's method in a part": ({"parts": [{"method": "ge"}]}, "method is a key of a run's recipe"),
    "run's value": ({"epochs": 0}, "epochs is 0; expected greater than or equal to 1"),
    "run's values": ({"epochs": "x", "lr": -1}, "lr is -1; expected greater than 0"),
    "seeds": ({"seeds": 0}, "seeds is 0; expected at least 1"),
    "seeds below 0": ({"seeds": -2}, "seeds is -2; expected at least 1"),
    "seeds that are a truth": ({"seeds": True}, "seeds is True; expected integer"),
    "seeds that are a fraction": ({"seeds": 1.5}, "seeds is 1.5; expected integer"),
    "seeds in a part": ({"parts": [{}, {"seeds": 0}]}, "seeds is 0; expected at least 1"),
    "no methods": ({"methods": []}, "methods is empty; expected names such as ge,boostnet,metagf, or all"),
    "commas for methods": ({"methods": ", ,"}, "methods is empty"),
    "method": ({"methods": "bostnet"}, "unknown method 'bostnet'; did you mean boostnet"),
    "method in a table": ({"methods": [{"name": "bostnet"}]}, "did you mean boostnet"),
    "methods that are a number": ({"methods": 3}, "methods is 3; expected a name or a list of names"),
    "method that is a number": ({"methods": ["ge", 3]}, "methods has 3; expected a name, or a table with a name"),
    "table without a name": ({"methods": [{"nam": "ge"}]}, "expected a name, or a table with a name and fields"),
    "method's field": ({"methods": [{"name": "ge", "varriant": "paper"}]}, "'varriant'; did you mean variant"),
    "method's value": ({"methods": [{"name": "ge", "variant": "new"}]}, "variant is 'new'; expected paper | released"),
    "method's own recipe": ({"methods": [{"name": "ge", "batch_size": "many"}]}, "batch_size is 'many'"),
    "baseline": ({"baseline": "jint"}, "unknown method 'jint'; did you mean joint"),
    "baseline that is a number": ({"baseline": 3}, "baseline is 3; expected text"),
    "backbone": ({"backbone": ["msdnet-tinny"]}, "did you mean msdnet-tiny"),
    "no backbone": ({"backbone": []}, "backbone is []; expected a name or a list of names"),
    "backbone of nothing": ({"backbone": [" "]}, "backbone has ' '; expected a name, or a table"),
    "backbone's field": ({"backbone": [{"name": "msdnet-tiny", "growht": 3}]}, "'growht'; did you mean growth"),
    "data set": ({"dataset": "digts"}, "unknown data set 'digts'; did you mean digits?"),
    "what it stands for": ({"dataset": {"name": "digits", "stands_for": 3}}, "stands_for is 3; expected text"),
    "set": ({"set": ["lr"]}, "set is ['lr']"),
    "set value": ({"set": {"batch_size": 1}}, "batch_size is 1; expected greater than or equal to 2"),
    "set key of a run": ({"set": {"seed": 3}}, "'seed'"),
    "sweep": ({"sweep": ["lr"]}, "sweep is ['lr']"),
    "sweep without a list": ({"sweep": {"lr": 0.1}}, "sweep is {'lr': 0.1}"),
    "empty sweep": ({"sweep": {"lr": []}}, "sweep of lr is empty; expected a list of values"),
    "swept value": ({"sweep": {"lr": [0.1, -1]}}, "lr is -1; expected greater than 0"),
    "static": ({"static": "often"}, "static is 'often'; expected true | false"),
    "published": ({"published": ["boostnet/tabel1"]}, "unknown published table 'boostnet/tabel1'; did you mean"),
    "published number": ({"published": 3}, "published is 3"),
    "figure": ({"figures": "diagnoze"}, "unknown figure 'diagnoze'; did you mean diagnose?"),
    "report": ({"report": {"cots": "macs"}}, "unknown field of report 'cots'; did you mean cost"),
    "report value": ({"report": {"cost": "time"}}, "report: cost is 'time'; expected macs | papers | latency"),
    "report text": ({"report": "macs"}, "report is 'macs'"),
    "title": ({"title": 3}, "title is 3; expected text"),
    "note": ({"note": ["x"]}, "note is ['x']; expected text"),
    "parts": ({"parts": "ge"}, "parts is 'ge'"),
    "part": ({"parts": ["ge"]}, "parts is ['ge']"),
    "parts of parts": ({"parts": [{"parts": []}]}, "a part has parts; expected all parts at the top level"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_value_is_one_line_that_names_it(mistake):
    values, says = BAD[mistake]
    with pytest.raises(UserError) as error:
        Plan.make(PLAIN | values).runs()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_all_bad_values_are_told_at_once():
    with pytest.raises(UserError, match=r"seeds is 'two'.*title is 3"):
        Plan.make(PLAIN | {"seeds": "two", "title": 3})


@pytest.mark.parametrize("option", ["seeds", "lr", "epochs", "batch-size", "threads", "probe-every", "jobs"])
def test_a_zero_on_the_command_line_is_refused(option, cli, tmp_path):
    code, printed, errors = cli("compare", f"--{option}", "0", "--out", "study")
    assert code == 2 and not printed and not list(tmp_path.iterdir())
    (line,) = errors.splitlines()
    assert line.startswith("exitkit: ") and f"{option} is 0".replace("-", "_") in line.replace("-", "_")


def test_a_plan_is_shown_and_nothing_is_done(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_timed", lambda recipe, data: Timing(1000, 4, [Step(0.06)]))
    code, printed, _ = cli("compare", "--plan", "--methods", "ge", "--epochs", "2", "--jobs", "3", "--out", "study")
    # Two methods with two seeds, 2 epochs of 1000 images of 60 ms each: four runs of 120 s, three at a time.
    assert code == 0 and "plan: 4 runs; about 4 min, 3 at a time" in printed
    here = ("--launcher", "here", "--methods", "ge", "--epochs", "2")
    assert "plan: 4 runs; about 8 min, 1 at a time" in cli("compare", "--plan", *here).out
    assert not list(tmp_path.iterdir())


def test_a_plan_without_data_is_from_the_catalogue_and_given_times(cli, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("images are read")

    monkeypatch.setattr(estimates, "_timed", refuse)
    monkeypatch.setattr(job, "load_data", refuse)
    plan = ("compare", "--plan", "--no-data", "--methods", "ge", "--seeds", "2", "--jobs", "2")
    data = ("--dataset", "cifar100,imagenet", "--out", "study")
    result = cli(*plan, *data)
    assert result.code == 0 and not list(tmp_path.iterdir())
    text = " ".join(result.out.split())
    assert "cifar100: 100 classes; 45,000 training, 5,000 validation and 10,000 test images, as catalogued" in text
    assert "imagenet: 1,000 classes; 1,231,167 training" in text
    assert "plan: 8 runs; unknown time (give --seconds-per-run), 2 at a time" in text
    timed = cli(*plan, *data, "--seconds-per-run", "1800")
    assert "plan: 8 runs; about 2 h 0 min, 2 at a time" in " ".join(timed.out.split())
    facts = json.loads(cli(*plan, *data, "--json").out)
    assert facts["unknown"] == 8 and {run["seconds"] for run in facts["runs"]} == {None}
    own = cli(*plan, "--dataset", "folder", "--data-dir", "images")
    assert own.code == 0 and "known when they are read" in " ".join(own.out.split())
    for option in (("--no-data",), ("--seconds-per-run", "5")):
        cli("compare", *option).refused(f"{option[0]} is given without --plan")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, "45,000 training, 5,000 validation"),
        ({"validation": 1000}, "49,000 training, 1,000 validation"),
        ({"per_class": 45}, "4,500 training, 500 validation"),
        ({"per_class": 45, "validation": 4000}, "4,500 training, 4,000 validation"),
        ({"imbalance": 100.0}, "9,754 training, 5,000 validation"),
    ],
)
def test_catalogued_sizes_follow_the_settings(settings, parts):
    (line,) = describe_catalogued(configure("dataset", "cifar100", settings))
    assert line == f"100 classes; {parts} and 10,000 test images, as catalogued (nothing was read)"


def test_the_catalogued_digits_are_the_digits():
    data = configure("dataset", "digits", {}).load(None)
    (line,) = describe_catalogued(configure("dataset", "digits", {}))
    assert describe(data)[1] in line


def test_a_plan_states_the_memory_of_a_run_and_limits_the_parallel_runs_to_that_of_the_machine(cli, monkeypatch):
    monkeypatch.setattr(estimates, "_timed", lambda recipe, data: Timing(1000, 4, [Step(0.06)], 2048.0))
    monkeypatch.setattr(memory, "available_mib", lambda: 5000.0)
    monkeypatch.setattr(launchers, "default_jobs", lambda device, threads: 4)
    plan = ("compare", "--plan", "--methods", "ge", "--epochs", "2", "--device", "cpu")
    code, printed, errors = cli(*plan)
    assert "a run needs about 2.0 GiB, and 4.9 GiB are free: 2 at a time" in errors
    assert code == 0 and "4 runs; about 4 min, 2 at a time, up to 2.0 GiB of memory each" in printed
    more = cli(*plan, "--jobs", "3")
    assert "3 at a time" in more.out and "3 runs at a time may not fit; expected at most --jobs 2" in more.errors
    printed = cli(*plan, "--jobs", "2", "--json").out
    assert [run["peak_mib"] for run in json.loads(printed)["runs"]] == [2048.0] * 4


def test_the_peak_memory_is_measured_with_a_step_or_read_from_a_run(tmp_path):
    tiny = {"backbone": "msdnet-tiny", "epochs": 1, "device": "cpu"}
    small, large = (Recipe.make(**tiny, batch_size=size).resolve() for size in (64, 512))
    estimate = Estimate(tmp_path)
    assert 100 < estimate.peak_mib(small) < estimate.peak_mib(large) < 10_000
    run = exitkit.train(small, tmp_path)
    assert Estimate(tmp_path).peak_mib(small) == run.training_cost()["memory_mib"]


@pytest.mark.parametrize(
    ("seconds", "jobs", "expected"),
    [([5, 3, 4, 3, 3], 2, 10.0), ([5, 3, 4, 3, 3], 1, 18.0), ([1, 2, 3], 8, 3.0), ([1, 2], 0, 3.0), ([], 2, 0.0)],
)
def test_runs_are_put_longest_first_onto_what_is_free_first(seconds, jobs, expected):
    assert wall_time(seconds, jobs) == expected


WORDS = {0: "1 s", 0.4: "1 s", 40: "40 s", 89: "89 s", 90: "2 min", 720: "12 min", 5280: "88 min", 5400: "1 h 30 min"}
WORDS |= {12000: "3 h 20 min", 7200: "2 h 0 min", 129000: "35 h 50 min", 172800: "2 days", 432000: "5 days"}


@pytest.mark.parametrize("seconds", WORDS)
def test_durations_are_written_as_a_person_would(seconds):
    assert in_words(seconds) == WORDS[seconds]


def test_an_estimate_is_of_timed_steps_or_of_runs_that_are_there(tmp_path, monkeypatch):
    timed, times = [], Timing(1000, 4, [Step(0.001), Step(0.003)])
    monkeypatch.setattr(estimates, "_timed", lambda recipe, data: timed.append(recipe.id) or times)
    tiny = {"backbone": "msdnet-tiny", "batch_size": 512}

    def wanted(method="joint", **values):
        return Recipe.make(**(tiny | {"method": method, "epochs": 3} | values)).resolve()

    # 1000 images of 1 ms, 3 times; IMTA has a second phase, which is timed by itself; `separate` splits its epochs,
    # and its phases beyond those that were timed take what the last one does.
    fresh = Estimate(tmp_path)
    assert fresh.seconds(wanted()) == pytest.approx(3.0)
    assert fresh.seconds(wanted("imta", epochs=10)) == pytest.approx(10 * 1.0 + 6 * 3.0)
    assert fresh.seconds(wanted("separate", epochs=4)) == pytest.approx(2 * 1.0 + (1 + 1) * 3.0)
    assert len(timed) == 3
    assert fresh.seconds(wanted(lr=0.3)) == pytest.approx(3.0) and len(timed) == 3
    assert fresh.seconds(wanted(batch_size=64)) == pytest.approx(3.0) and len(timed) == 4

    run = exitkit.train(tiny | {"epochs": 2, "device": "cpu"}, tmp_path)
    head, *rows = [line.split(",") for line in (run.path / "timing.csv").read_text().splitlines()]
    for row, seconds in zip(rows, ("40.0", "20.0"), strict=True):
        row[head.index("seconds")] = seconds
    (run.path / "timing.csv").write_text("".join(",".join(row) + "\n" for row in [head, *rows]))
    known = Estimate(tmp_path)
    assert known.seconds(wanted(seed=7, lr=0.2)) == pytest.approx(90.0) and len(timed) == 4
    assert known.seconds(wanted("ge")) == pytest.approx(3.0) and len(timed) == 5  # of another method
    assert known.seconds(wanted(batch_size=64)) == pytest.approx(3.0) and len(timed) == 6  # of another batch size


def test_data_and_costs_are_read_once_for_all_methods(tmp_path, monkeypatch):
    loads, load = [], job.load_data
    monkeypatch.setattr(job, "load_data", lambda recipe: loads.append(recipe.method) or load(recipe))
    tiny, estimate = {"backbone": "msdnet-tiny", "batch_size": 8, "epochs": 2}, Estimate(tmp_path)
    for method in ("joint", "ge", "separate"):
        recipe = Recipe.make(method=method, **tiny).resolve()
        assert estimate.seconds(recipe) > 0
        assert estimate.costs(recipe) == exitkit.cost(exitkit.build_network("msdnet-tiny"))
    assert loads == ["joint"]


def test_a_method_that_raises_is_left_to_its_run(tmp_path, monkeypatch):
    def raises(self, run):
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(type(exitkit.build_strategy("joint")), "exit_weights", raises)
    with pytest.warns(Note, match=r"no time estimate for joint \(ZeroDivisionError: by nought\)"):
        assert Estimate(tmp_path).seconds(Recipe.make(backbone="msdnet-tiny", epochs=2).resolve()) == 0


def test_what_init_from_leaves_out_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_timed", lambda recipe, data: Timing(1000, 4, [Step(0.001), Step(0.003)]))
    run = exitkit.train({"method": "ge", "epochs": 1, "batch_size": 512}, tmp_path)
    recipe = Recipe.make(method="imta", epochs=10, init_from=str(run.path)).resolve()
    assert Estimate(tmp_path).seconds(recipe) == pytest.approx(6 * 3.0)


def test_a_budget_that_no_exit_meets_is_told_before_anything_is_trained(cli, tmp_path):
    (tmp_path / "mine.toml").write_text('methods = ["ge"]\nepochs = 1\n[report]\nbudgets = ["100K", "2K"]\n')
    cli("compare", "--recipe", "mine.toml", "--out", "study").refused(
        "budget 2K is below the lowest cost of a first exit; expected at least 37"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_the_plan_of_a_recipe_without_runs_draws_nothing(cli, tmp_path):
    code, printed, _ = cli("compare", "--plan", "--recipe", "metagf-fig1-quick", "--out", "study")
    assert code == 0 and printed.startswith("plan: ") and not list(tmp_path.iterdir())
    cli("compare", "--json", "--recipe", "metagf-fig1-quick", "--out", "study").refused("expected no --json")
    assert not list(tmp_path.iterdir())


def test_one_name_in_the_place_of_several_stands_for_the_first_of_them():
    entries = [{"name": "digits", "stands_for": name} for name in ("cifar10", "cifar100")]
    found = _values({"dataset": entries}, {"dataset": "fashion-mnist"}, {}, {})["dataset"]
    assert found == [{"name": "fashion-mnist", "stands_for": "cifar10"}]
    more = _values({"dataset": entries[:1]}, {"dataset": "fashion-mnist,cifar100"}, {}, {})["dataset"]
    assert more == [{"name": "fashion-mnist", "stands_for": "cifar10"}, "cifar100"]


def test_every_method_can_be_timed_and_the_costly_ones_cost_more(tmp_path):
    recipe = {"backbone": "msdnet-tiny", "batch_size": 32, "epochs": 5}
    methods = ["joint", "imta", "separate", "kd", "metagf", "l2w", "pcgrad", "ge+ofa"]
    settings = {"kd": {"teacher": "ge"}}
    recipes = {m: Recipe.make(**recipe, method=m, method_settings=settings.get(m, {})).resolve() for m in methods}
    estimate = Estimate(tmp_path)
    seconds = {method: estimate.seconds(each) for method, each in recipes.items()}
    assert all(0 < each < 1000 for each in seconds.values())
    assert seconds["metagf"] > 1.5 * seconds["joint"] < seconds["l2w"]  # about 5 and 6 times, and clocks are noisy


@pytest.mark.parametrize("names", ["ge,,boostnet", "ge,", ",ge"])
def test_an_empty_name_among_methods_is_a_mistake(names):
    with pytest.raises(UserError, match="methods has an empty name"):
        Plan.make({"methods": names})


def test_values_without_effect_beside_others_are_left_out_of_a_run():
    sweep = {"gate": ["hard", "soft"], "sharpness": [2, 3]}
    swept = Plan.make({"methods": "cgt", "baseline": "cgt", "seeds": 1, "sweep": sweep})
    found = [(run.recipe.method_settings["gate"], run.recipe.method_settings["sharpness"]) for run in swept.runs()]
    assert found == [("hard", 1.0), ("soft", 2.0), ("soft", 3.0)]
    entries = ["l2w", {"name": "l2w", "weights": "fixed"}]
    given = Plan.make({"methods": entries, "baseline": "l2w", "seeds": 1, "set": {"epsilon": 0.3}})
    assert [run.recipe.method_settings["epsilon"] for run in given.runs()] == [0.3, 0.8]
    with pytest.raises(UserError, match="sharpness has no effect in any run"):
        Plan.make({"methods": "cgt", "baseline": "cgt", "set": {"sharpness": 2}}).runs()
