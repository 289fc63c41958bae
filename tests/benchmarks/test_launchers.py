"""Campaigns: what comes when, what becomes of runs that fail, and that it is all one where a run is trained."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

import pandas as pd
import pytest
import torch

from exitkit import Recipe
from exitkit.benchmarks.campaign import queue as campaigns
from exitkit.benchmarks.campaign.launchers import Event, Here, Processes, default_jobs, make_launcher
from exitkit.benchmarks.campaign.queue import Campaign
from exitkit.benchmarks.campaign.record import failure
from exitkit.errors import UserError
from exitkit.runs.folder import RunFolder

from toy import FEW

TINY = {"backbone": "msdnet-tiny", "dataset": "digits", "epochs": 1, "device": "cpu", **FEW}


def resolved(method="joint", **values):
    return Recipe.make(**(TINY | {"method": method} | values)).resolve()


def go(recipes, out, launcher, tell=lambda event: None):
    """Run a campaign; returns {name: reason} of what failed, and its events."""
    events = []

    def note(event):
        events.append(event)
        tell(event)

    failed = Campaign(recipes, out, launcher, note).run()
    return {recipes[index].id: reason for index, reason in failed.items()}, events


def kinds(events, recipes):
    return [(recipes[event.index].method, event.kind) for event in events]


def weights(out, recipes):
    return {recipe.id: (out / recipe.id / "weights.safetensors").read_bytes() for recipe in recipes}


def finish(out, recipe):
    """Leave what a finished run leaves, as far as a campaign looks."""
    (out / recipe.id).mkdir(parents=True, exist_ok=True)
    (out / recipe.id / "results.json").write_text("{}")


class Scripted:
    """A launcher that trains nothing: each run ends as it is told to, the one begun first before the others."""

    def __init__(self, slots=1, **ends):
        self.slots, self.ends = slots, ends
        self.started, self.under_way, self.most, self.closed, self.reasons = [], [], 0, False, []

    def start(self, index, recipe, out):
        self.started.append(recipe.id)
        self.reasons.append(failure(out, recipe.id))
        self.under_way.append((index, recipe))
        self.most = max(self.most, len(self.under_way))

    def wait(self):
        index, recipe = self.under_way.pop(0)
        ends = self.ends.get(recipe.method)
        kind, facts = ends.pop(0) if ends else ("done", {})
        if kind == "interrupt":
            raise KeyboardInterrupt
        return Event(index, kind, facts)

    def close(self):
        self.closed = True


FAILED = ("failed", {"message": "it rained"})


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A campaign in one worker process, which is killed at the first of three runs; its launcher left its variables."""
    out, processes, real = tmp_path_factory.mktemp("killed"), [], subprocess.Popen
    recipes = [resolved(epochs=500), resolved("joint"), resolved("ge")]

    def recorded(*arguments, **options):
        processes.append(real(*arguments, **options))
        return processes[-1]

    def kill(event):
        if (event.index, event.kind) == (0, "progress") and len(processes) == 1:
            os.kill(processes[0].pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", recorded)
        patch.setenv("WORLD_SIZE", "2")
        failed, events = go(recipes, out, Processes(1, 1), kill)
    return recipes, out, failed, events, processes


@pytest.fixture(scope="module")
def reference(killed):
    """The runs that a second worker process trained, and their weights."""
    recipes, out, *_ = killed
    return recipes[1:], weights(out, recipes[1:])


def test_a_worker_that_is_killed_fails_at_its_run_alone(killed):
    recipes, out, failed, events, processes = killed
    doomed = recipes[0].id
    assert list(failed) == [doomed] and "exit code -9" in failed[doomed]
    assert failure(out, doomed) == f"failed: {failed[doomed]}"
    assert [RunFolder(out / recipe.id).finished for recipe in recipes] == [False, True, True]
    ends = [(event.index, event.kind) for event in events if event.kind != "progress"]
    assert ends == [(0, "begun"), (0, "failed"), (1, "begun"), (1, "done"), (2, "begun"), (2, "done")]
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)


def test_runs_trained_here_are_those_of_worker_processes_byte_for_byte(reference, tmp_path):
    recipes, expected = reference
    failed, events = go(recipes, tmp_path, Here())
    assert not failed
    assert weights(tmp_path, recipes) == expected and len(set(expected.values())) == 2
    assert [(event.index, event.kind) for event in events] == [(0, "begun"), (0, "done"), (1, "begun"), (1, "done")]


def test_runs_trained_by_submitit_are_those_of_worker_processes_byte_for_byte(reference, tmp_path):
    pytest.importorskip("submitit")
    recipes, expected = reference
    launcher = make_launcher("submitit-local", 2, recipes[0], tmp_path, {"timeout_min": "5"})
    failed, events = go(recipes, tmp_path, launcher)
    assert not failed
    assert weights(tmp_path, recipes) == expected
    assert sorted(event.index for event in events if event.kind == "done") == [0, 1]
    assert len(list((tmp_path / "slurm").glob("*_log.out"))) == 2 and not list(tmp_path.rglob("*%*"))


def test_a_run_that_diverges_leaves_the_others_going_on(tmp_path):
    bad = resolved("metagf", method_settings={"auxiliary_weight": 1e30})
    good = resolved("joint")
    failed, events = go([good, bad], tmp_path, Here())
    assert [(event.index, event.kind) for event in events] == [(1, "begun"), (1, "failed"), (0, "begun"), (0, "done")]
    assert list(failed) == [bad.id] and "not finite" in failed[bad.id]
    assert RunFolder(tmp_path / good.id).finished and not RunFolder(tmp_path / bad.id).finished
    assert [path.name for path in (tmp_path / "failures").iterdir()] == [f"{bad.id}.json"]
    assert json.loads((tmp_path / "failures" / f"{bad.id}.json").read_text())["reason"] == failed[bad.id]


def test_two_campaigns_in_one_folder_train_every_run_once(reference, tmp_path):
    recipes = [resolved(seed=seed) for seed in range(3)]
    written, lock = {recipe.id: set() for recipe in recipes}, threading.Lock()

    def note(event):
        if event.kind == "done":
            name = recipes[event.index].id
            with lock:
                written[name].add((tmp_path / name / "results.json").stat().st_mtime_ns)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = [pool.submit(go, recipes, tmp_path, Processes(1, 1), note) for _ in range(2)]
        ends = [each.result(timeout=300) for each in both]
    for failed, events in ends:
        assert not failed
        assert sorted(event.index for event in events if event.kind == "done") == [0, 1, 2]
    assert not (tmp_path / "failures").exists()
    for recipe in recipes:
        path = tmp_path / recipe.id
        assert written[recipe.id] == {(path / "results.json").stat().st_mtime_ns}
        assert len(pd.read_csv(path / "timing.csv")) == len(pd.read_csv(path / "metrics.csv")) == 1
    assert weights(tmp_path, recipes)[recipes[0].id] == reference[1][recipes[0].id]
    assert not list(tmp_path.rglob("*.part"))


def test_the_longest_begin_first_and_of_one_length_the_first(tmp_path):
    # Meta-GF passes over the data once an exit and once more; `separate` splits its epochs, and lasts no longer.
    recipes = [resolved(seed=2), resolved(seed=1), resolved(epochs=3), resolved("metagf")]
    recipes += [resolved(epochs=2), resolved("separate", epochs=4)]
    launcher = Scripted()
    assert go(recipes, tmp_path, launcher)[0] == {} and launcher.closed
    assert launcher.started == [recipes[index].id for index in (3, 5, 2, 4, 0, 1)]


def test_phases_that_depend_on_the_number_of_exits_are_those_of_the_network(tmp_path):
    recipe = resolved("separate", epochs=4, method_settings={"order": "branch", "shares": [0.25] * 4})
    launcher = Scripted()
    assert go([recipe], tmp_path, launcher)[0] == {} and launcher.started == [recipe.id]


def test_as_many_are_under_way_as_there_are_slots(tmp_path):
    recipes = [resolved(seed=seed) for seed in range(5)]
    for slots in (1, 2, 9):
        launcher = Scripted(slots)
        go(recipes, tmp_path, launcher)
        assert launcher.most == min(slots, 5) and len(launcher.started) == 5


def test_a_teacher_is_trained_before_its_pupil(tmp_path):
    recipes = [resolved("kd", method_settings={"teacher": "ge"}), resolved("ge"), resolved("joint")]
    launcher = Scripted(slots=3)
    failed, events = go(recipes, tmp_path, launcher)
    assert not failed
    assert kinds(events, recipes)[:4] == [("ge", "begun"), ("joint", "begun"), ("ge", "done"), ("kd", "begun")]


def test_a_pupil_without_its_teacher_in_the_campaign_waits_for_nobody(tmp_path):
    recipes = [resolved("kd", method_settings={"teacher": "ge"}), resolved("ge", epochs=2)]
    launcher = Scripted(slots=2)
    assert go(recipes, tmp_path, launcher)[0] == {}
    assert launcher.most == 2


def test_a_pupil_fails_with_its_teacher_and_nobody_else_does(tmp_path):
    recipes = [resolved("kd", method_settings={"teacher": "ge"}), resolved("ge"), resolved("joint")]
    launcher = Scripted(ge=[FAILED])
    failed, events = go(recipes, tmp_path, launcher)
    pupil, teacher, other = (recipe.id for recipe in recipes)
    assert failed == {teacher: "it rained", pupil: f"its teacher {teacher} failed"}
    assert launcher.started == [teacher, other]
    assert failure(tmp_path, pupil) == f"failed: its teacher {teacher} failed"
    told = {recipes[event.index].id: event.facts["message"] for event in events if event.kind == "failed"}
    assert told == failed


def test_a_reason_is_kept_until_the_run_is_tried_again(tmp_path):
    recipes = [resolved("ge"), resolved("joint")]
    assert go(recipes, tmp_path, Scripted(ge=[FAILED]))[0] == {recipes[0].id: "it rained"}
    file = tmp_path / "failures" / f"{recipes[0].id}.json"
    assert json.loads(file.read_text())["reason"] == "it rained"
    assert failure(tmp_path, recipes[1].id) == ""
    again = Scripted()
    assert go(recipes, tmp_path, again)[0] == {}
    assert again.started[0] == recipes[0].id and again.reasons == ["", ""]
    assert not file.exists()


def test_a_run_that_someone_else_is_at_is_put_back_and_tried_again(tmp_path):
    recipes = [resolved("ge"), resolved("joint")]
    launcher = Scripted(ge=[("held", {}), ("held", {})])
    failed, events = go(recipes, tmp_path, launcher)
    assert not failed and not (tmp_path / "failures").exists()
    ge, joint = (recipe.id for recipe in recipes)
    assert launcher.started == [ge, joint, ge, ge]
    assert kinds(events, recipes)[-1] == ("ge", "done")


def test_a_run_that_is_held_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(campaigns, "_POLL", 0.01)
    held, free = resolved(epochs=2), resolved()
    holding = contextlib.ExitStack()
    holding.enter_context(RunFolder.create(tmp_path, held, {}).held())
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:  # the other process is gone, and has not finished it
            holding.close()

    monkeypatch.setattr(campaigns.time, "sleep", nap)
    launcher = Scripted(slots=2)
    assert go([held, free], tmp_path, launcher)[0] == {}
    assert launcher.started == [free.id, held.id]
    assert naps == [0.01] * 3


def test_a_run_that_is_finished_elsewhere_is_not_begun(tmp_path):
    recipes = [resolved(seed=seed) for seed in range(3)]
    finish(tmp_path, recipes[1])

    def meanwhile(event):
        if event.index == 0 and event.kind == "begun":
            finish(tmp_path, recipes[2])

    launcher = Scripted()
    failed, events = go(recipes, tmp_path, launcher, meanwhile)
    assert not failed and launcher.started == [recipes[0].id]
    assert [event.index for event in events if event == Event(event.index, "done", {"elsewhere": True})] == [1, 2]


def test_a_teacher_that_is_finished_elsewhere_lets_its_pupil_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(campaigns, "_POLL", 0.01)
    recipes = [resolved("kd", method_settings={"teacher": "ge"}), resolved("ge")]
    finish(tmp_path, recipes[1])
    launcher = Scripted()
    assert go(recipes, tmp_path, launcher)[0] == {}
    assert launcher.started == [recipes[0].id]


def test_interrupted_it_closes_the_launcher(tmp_path):
    launcher = Scripted(joint=[("interrupt", {})])
    with pytest.raises(KeyboardInterrupt):
        go([resolved()], tmp_path, launcher)
    assert launcher.closed


def test_one_run_at_once_for_every_group_of_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [default_jobs("cpu", threads) for threads in (1, 3, 8, 100)] == [8, 2, 1, 1]


REFUSED = {
    "launcher": ("procesess", {}, "unknown launcher 'procesess'; did you mean processes?"),
    "parameters for here": ("here", {"timeout_min": "1"}, "--slurm needs --launcher slurm, got here"),
    "parameters for processes": ("processes", {"time": "1"}, "--slurm needs --launcher slurm, got processes"),
    "unknown parameter": ("submitit-local", {"timeout_mn": "1"}, "'timeout_mn'"),
    "unknown parameter of slurm": ("submitit-local", {"slurm_partitoin": "gpu"}, "'slurm_partitoin'"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_about_launchers_says_what_is_wrong(mistake, tmp_path):
    name, parameters, says = REFUSED[mistake]
    if name.startswith("submitit"):
        pytest.importorskip("submitit")
    with pytest.raises(UserError) as error:
        make_launcher(name, 1, resolved(), tmp_path, parameters)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_without_submitit_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"needs submitit; install it with: pip install 'exitkit\[slurm\]'"):
        make_launcher("slurm", 1, resolved(), tmp_path, {})


def test_where_there_is_no_slurm_it_is_said(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"srun|[Ss]lurm"):
        make_launcher("slurm", 1, resolved(), tmp_path / "out", {})


def test_jobs_that_the_cluster_refuses_are_one_line(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    launcher = make_launcher("submitit-local", 1, resolved(), tmp_path, {})

    def refuse(*_):
        raise submitit.core.utils.FailedJobError("sbatch: error: invalid partition\nspecified: typo")

    monkeypatch.setattr(launcher._executor, "submit", refuse)
    launcher.start(0, resolved(), tmp_path)
    with pytest.raises(
        UserError, match=r"^--launcher submitit-local: sbatch: error: invalid partition specified: typo$"
    ):
        launcher.wait()


def test_a_parameter_that_is_no_number_is_refused(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match="timeout_min"):
        make_launcher("submitit-local", 1, resolved(), tmp_path, {"timeout_min": "soon"})


def test_a_parameter_may_be_a_fraction(tmp_path):
    pytest.importorskip("submitit")
    make_launcher("submitit-local", 1, resolved(), tmp_path, {"mem_gb": "1.5"})


def test_what_is_refused_leaves_no_folder_behind(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(UserError):
        make_launcher("submitit-local", 1, resolved(), tmp_path / "out", {"timeout_mn": "1"})
    assert not (tmp_path / "out").exists()


def test_a_worker_killed_within_a_message_ends_its_run_and_no_listener():
    import queue
    from types import SimpleNamespace

    from exitkit.benchmarks.campaign.launchers import _Worker

    answers = queue.SimpleQueue()
    worker = _Worker.__new__(_Worker)
    worker.process = SimpleNamespace(stdout=iter(['{"event": "progress"}\n', '{"event": "prog']))
    worker._listen(answers)
    assert answers.get() == (worker, {"event": "progress"})
    assert answers.get() == (worker, None)


def test_a_worker_is_given_its_gpu_by_the_environment_and_not_by_the_recipe(monkeypatch):
    from exitkit.benchmarks.campaign import launchers

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [launchers.gpu_of(number) for number in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert [launchers.gpu_of(number) for number in range(3)] == ["5", "7", "5"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launchers.gpu_of(0) is None
