"""The benchmark of speed: what it makes of times, and that every part of it runs. No test here looks at the clock."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import binom

from exitkit.benchmarks.speed import timing
from exitkit.benchmarks.speed.__main__ import PARTS, speed
from exitkit.benchmarks.speed.gpu import eager, prepared
from exitkit.benchmarks.speed.inference import saved, single
from exitkit.benchmarks.speed.layouts import FORMS, layouts, plain
from exitkit.benchmarks.speed.loading import loading_share, noise_images
from exitkit.benchmarks.speed.row import judged, not_run
from exitkit.benchmarks.speed.stages import stage_shares, stages
from exitkit.benchmarks.speed.timing import Ratio, median_interval, paired_ratios
from exitkit.benchmarks.speed.training import AGGREGATORS, LIMITS, l2w_rows, metagf_rows, methods, step_rows
from exitkit.benchmarks.speed.work import Work
from exitkit.cli import main
from exitkit.errors import UserError
from exitkit.plugins import registered

TINY = Work("sdn-tiny", batch=16, classes=10, shape=(1, 16, 16), rounds=1)


def test_a_ratio_is_the_median_of_pairs_that_take_turns(monkeypatch):
    calls, taken = [], {"ours": iter([9, 4, 6, 8]), "base": iter([1, 2, 2, 2])}

    def seconds(call):
        calls.append(call())
        return next(taken[calls[-1]])

    monkeypatch.setattr(timing, "_seconds", seconds)
    ratio = paired_ratios(lambda: "ours", lambda: "base", rounds=3)
    assert ratio == Ratio(3.0, 2.0, 4.0, 6.0)  # the first pair is warm-up
    assert list(zip(calls[::2], calls[1::2], strict=True)) == [("ours", "base"), ("base", "ours")] * 2


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9, 15, 40])
def test_the_interval_holds_the_median_as_surely_as_it_says(n):
    low, high = median_interval([float(value) for value in range(n)])
    outside = int(low)
    assert high == n - 1 - outside
    assert n < 6 or 2 * binom.cdf(outside, n, 0.5) <= 0.05 < 2 * binom.cdf(outside + 1, n, 0.5)


def test_a_verdict_is_of_the_median_against_the_limit_from_either_side():
    ratio = Ratio(1.0, 0.5, 2.0, 0.1)
    assert judged("x", 1.0, ratio).verdict == "met" and judged("x", 0.9, ratio).verdict == "missed"
    assert judged("x", 1.0, ratio, at_least=True).verdict == "met"
    assert judged("x", 1.1, ratio, at_least=True).verdict == "missed"
    assert not_run("x", 1.0) == ("x", 1.0, None, None, "not-run")


def test_every_method_of_one_phase_and_pass_is_timed_and_every_limit_is_of_a_method():
    names = methods(TINY)
    assert {*LIMITS, *AGGREGATORS, "joint", "l2w", "kd"} - {"nashmtl"} <= set(names) <= set(registered("method"))
    assert not {"metagf", "imta", "separate"} & set(names)


def test_all_parts_of_training_run(monkeypatch):
    torch.set_num_threads(1)
    from exitkit.benchmarks.speed import training

    monkeypatch.setattr(training, "methods", lambda work: ["ge", "kd"])
    monkeypatch.setattr(training, "step_mib", lambda work, method: 1.0)
    found = list(step_rows(TINY))
    assert [type(each).__name__ for each in found] == ["Measured", "Measured", "Row", "Measured"]
    rows = [*l2w_rows(TINY, large=8, small=4), *metagf_rows(TINY, batches=1)]
    assert len(rows) == 4 and all(row.measured > 0 for row in rows)
    assert 0 < loading_share(TINY, batches=2) < 1


def test_both_ways_of_training_that_a_gpu_compares_run_on_a_cpu(monkeypatch):
    from exitkit.benchmarks.speed import gpu

    monkeypatch.setattr(gpu, "_BATCHES", 2)
    monkeypatch.setattr(gpu, "_WORKERS", 0)
    monkeypatch.setattr(gpu, "compile_parts", lambda network: None)
    prepared(TINY)()
    eager(TINY)()


def test_images_read_one_by_one_are_those_read_in_batches():
    from exitkit.benchmarks.speed.gpu import _OneByOne

    data = noise_images(replace(TINY, shape=(3, 8, 8)), 20)
    plain = replace(data, padding=0)
    (batch,) = plain.batches("train", [torch.arange(20)], augment=False, seed=0)
    apart = torch.stack([_OneByOne(plain)[n][0] for n in range(20)])
    # Some are flipped: each row of pixels is the same, but for its order.
    torch.testing.assert_close(apart.sort(-1).values, batch.images.sort(-1).values)
    assert [int(_OneByOne(data)[n][1]) for n in range(20)] == batch.labels.tolist()


def test_early_exit_is_measured_where_half_of_the_operations_are_saved():
    work = replace(TINY, batch=64, rounds=1)
    assert saved(work).seconds > 0 and single(replace(work, batch=1)).seconds > 0


def test_stages_share_the_work_and_half_of_it_is_saved(capsys):
    shares = stage_shares(TINY)
    assert shares.operations.sum() == pytest.approx(1) and shares.time.sum() == pytest.approx(1)
    assert shares.reach[0] == 1 and (shares.reach[:-1] >= shares.reach[1:]).all()
    assert shares.reach @ shares.operations == pytest.approx(0.5, abs=0.1)  # 16 images: shares are rounded
    even = shares._replace(time=shares.operations, reach_time=shares.reach)
    assert even.best == even.measured == pytest.approx(1)
    with pytest.raises(SystemExit, match="0"):
        main(["--network", "msdnet-tiny", "--batch", "8", "--rounds", "1"], command=stages)
    assert "time saved per multiply-adds saved" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of 1 images leaves early"):
        stage_shares(replace(TINY, batch=1))


def test_every_form_of_the_plain_loop_takes_the_same_steps(capsys):
    losses = {}
    for form in FORMS:
        torch.manual_seed(0)
        step = plain(TINY, form)
        for _ in range(2):
            step()
        network = inspect.getclosurevars(step).nonlocals["network"]
        losses[form] = torch.cat([p.detach().flatten() for p in network.parameters()])
    for form, weights in losses.items():
        close = 1e-3 if "bf16" in form else 1e-5
        torch.testing.assert_close(weights, losses["fp32"], rtol=close, atol=close)
    with pytest.raises(SystemExit, match="0"):
        main(["--networks", "msdnet-tiny", "--batch", "4", "--rounds", "1"], command=layouts)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| msdnet-tiny | ")


def test_json_is_a_list_of_targets_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--only", "evaluation,gpu", "--rounds", "1", "--json"], command=speed)
    assert not end.value.code
    rows = json.loads(capsys.readouterr().out)
    assert all(row.keys() == {"target", "limit", "measured", "ci", "verdict"} for row in rows)
    assert [row["verdict"] for row in rows[1:]] == ["not-run"] * 2 or torch.cuda.is_available()


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--only", "step"], "did you mean steps"), (["--only", ","], "empty"), (["--rounds", "0"], "at least 1")],
)
def test_mistakes_are_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as end:
        main(words, command=speed)
    assert end.value.code == 2 and told in capsys.readouterr().err
    assert next(iter(PARTS)) == "steps"
