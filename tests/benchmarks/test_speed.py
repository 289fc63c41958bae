"""The benchmark of speed: what it makes of times, and that every part of it runs. No test here looks at the clock."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import binom

import exitkit
from exitkit.benchmarks.speed import inference, plain, roofline, timing, training
from exitkit.benchmarks.speed.__main__ import PARTS, speed
from exitkit.benchmarks.speed.evaluation import policies_row
from exitkit.benchmarks.speed.gpu import eager, prepared, with_settings
from exitkit.benchmarks.speed.inference import engine_rows, more_than_one_session, saved, session_operations, single
from exitkit.benchmarks.speed.layouts import layouts
from exitkit.benchmarks.speed.loading import loading_share, noise_images
from exitkit.benchmarks.speed.plain import LOOPS
from exitkit.benchmarks.speed.roofline import counts, peak_bandwidth, peak_flops, rooflines
from exitkit.benchmarks.speed.row import Profile, Row, judged, not_run
from exitkit.benchmarks.speed.scaling import scaling_row
from exitkit.benchmarks.speed.stages import stage_shares, stages
from exitkit.benchmarks.speed.timing import Ratio, median_interval, paired_ratios
from exitkit.benchmarks.speed.training import (
    AGGREGATORS,
    FORMS,
    LIMITS,
    PLAIN_LIMITS,
    Speedup,
    l2w_rows,
    metagf_rows,
    methods,
    plain_rows,
    step_rows,
)
from exitkit.benchmarks.speed.work import Work
from exitkit.cli import main
from exitkit.errors import UserError
from exitkit.inference.export.programs import all_exits
from exitkit.methods.l2w import LearnedWeights
from exitkit.plugins import registered

TINY = Work("sdn-tiny", batch=16, classes=10, shape=(1, 16, 16), rounds=1)


def test_a_ratio_is_the_median_of_pairs_that_take_turns(monkeypatch):
    calls, taken = [], {"ours": iter([9, 4, 6, 8]), "base": iter([1, 2, 2, 2])}

    def seconds(call):
        calls.append(call())
        return next(taken[calls[-1]])

    monkeypatch.setattr(timing, "seconds", seconds)
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


def test_the_comparison_of_policies_is_timed_against_a_minute():
    row = policies_row(samples=60, classes=3)
    assert row.limit == 60 and row.measured > 0 and "60 images, 10 exits, 3 classes" in row.target


def test_every_method_of_one_phase_and_pass_is_timed_and_every_limit_is_of_a_method():
    names = methods(TINY)
    assert {*LIMITS, *AGGREGATORS, "joint", "l2w", "kd"} - {"nashmtl"} <= set(names) <= set(registered("method"))
    assert not {"metagf", "imta", "separate"} & set(names)


def test_a_meta_step_is_timed_where_it_is_said(monkeypatch):
    made, plain = [], LearnedWeights._meta_step
    monkeypatch.setattr(LearnedWeights, "_meta_step", lambda *arguments: (made.append(1), plain(*arguments))[1])
    for at, expected in ((0, 2 * 3), (1, 0)):  # one per half of the batch
        step = TINY.step("l2w", interval=100, at=at)
        made.clear()
        for _ in range(3):
            step()
        assert len(made) == expected


def test_all_parts_of_training_run(monkeypatch):
    torch.set_num_threads(1)
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
    with_settings(TINY, deterministic=False)()


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


def test_engines_are_measured_against_each_other_and_onnx_only_where_it_is_installed(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(inference, "_BATCH", 2)
    monkeypatch.setattr(inference, "more_than_one_session", lambda network, images: {})  # tested below
    results = list(engine_rows(TINY))
    rows = [result for result in results if isinstance(result, Row)]
    assert [row.target.partition(":")[0].split()[1] for row in rows[:3]] == ["folded", "onnx", "auto"]
    assert len(rows) == 9 and all(row.verdict != "not-run" and row.measured for row in rows)
    monkeypatch.setattr(inference, "missing_packages", lambda: ["onnx"])
    verdicts = {row.target: row.verdict for row in engine_rows(TINY) if isinstance(row, Row)}
    assert [target for target, verdict in verdicts.items() if verdict == "not-run"] == [
        f"engine onnx: stages one by one, batch {size}, in runs of one session" for size in (1, 2)
    ]


def test_operations_of_stages_are_measured_against_those_of_one_session():
    network = TINY.build().eval()
    images = torch.zeros(2, *network.input_shape)
    taken = session_operations([all_exits(network, images)], images, passes=2)
    assert taken.keys() >= {"Gemm"} and min(taken.values()) > 0
    more = more_than_one_session(network, images, count=3)
    assert len(more) == 3 and list(more.values()) == sorted(more.values(), reverse=True)


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


def change(work, network):
    """Return the change of the parameters since the network was made, as one vector."""
    starts = work.build().parameters()
    return torch.cat([(p - start).detach().flatten() for p, start in zip(network.parameters(), starts, strict=True)])


class TwoExits(Work):
    """A network with two exits, for which PCGrad's random order changes nothing."""

    def build(self):
        torch.manual_seed(0)
        return exitkit.build_network("msdnet-tiny", blocks=2).train()


@pytest.mark.parametrize("method", LOOPS)
def test_a_plain_loop_takes_the_steps_of_the_method(method, monkeypatch):
    kind = TwoExits if method == "pcgrad" else Work
    work = kind("msdnet-tiny", batch=16, classes=10, shape=(1, 16, 16), lr=1e-2)
    run, batch = work.run(method), work.data()
    run.position.epochs, run.position.steps = 10**9, 1000
    if method == "l2w":
        predictor = copy.deepcopy(run.auxiliaries["weights"].module)
        monkeypatch.setattr(plain, "weights_network", lambda exits: predictor)
    networks, optimizer = [], Work.optimizer
    monkeypatch.setattr(Work, "optimizer", lambda work, network: optimizer(work, networks.append(network) or network))
    step = LOOPS[method](work)
    for _ in range(2):
        step()
        run.train_epoch([batch] * 2) if method == "metagf" else run.train_step(batch)
    ours, reference = change(work, run.network), change(work, *networks)
    assert reference.norm() > 1e-3
    assert (ours - reference).norm() < 1e-4 * reference.norm()
    if method == "l2w":
        for ours, reference in zip(run.auxiliaries["weights"].module.parameters(), predictor.parameters(), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_every_plain_loop_is_measured_and_a_missed_target_has_a_profile(monkeypatch):
    assert LOOPS.keys() == PLAIN_LIMITS.keys()
    monkeypatch.setattr(training, "LOOPS", {"joint": LOOPS["joint"]})
    monkeypatch.setattr(training, "PLAIN_LIMITS", {"joint": 1e9})
    monkeypatch.setattr(training, "PLAIN_FP32_LIMIT", 0.0)
    monkeypatch.setattr(training, "choose_precision", lambda name, device: "bf16")
    fp32, auto, profile, speedup = plain_rows(TINY)
    assert (fp32.verdict, auto.verdict) == ("met", "missed")
    assert isinstance(profile, Profile) and profile.target == auto.target
    assert 0 < sum(profile.shares.values()) <= 1
    assert isinstance(speedup, Speedup) and speedup.ratios.keys() == FORMS.keys()
    monkeypatch.setattr(training, "choose_precision", lambda name, device: "fp32")
    auto, fp32, speedup = plain_rows(TINY)
    assert (fp32.verdict, auto.verdict) == ("met", "not-run")
    assert speedup.ratios.keys() == FORMS.keys() - {"auto"}


def test_the_work_of_a_step_is_counted_and_measured_against_the_core(monkeypatch):
    operations, elements = counts(TINY)
    macs = exitkit.cost(TINY.build())[-1].macs
    assert operations == pytest.approx(3 * 2 * macs * TINY.batch, rel=0.1)  # no gradient of the images is computed
    assert elements < counts(replace(TINY, batch=32))[1] < 2 * elements  # the weights do not grow with the batch
    monkeypatch.setattr(roofline, "peak_flops", lambda dtype: peak_flops(dtype, 64))
    monkeypatch.setattr(roofline, "peak_bandwidth", lambda: peak_bandwidth(2**16))
    for measured in rooflines(TINY):
        assert measured.arithmetic == pytest.approx(operations / measured.flops)
        assert min(measured.memory, measured.measured) > 0


def test_two_processes_are_measured_against_one():
    row = scaling_row(replace(TINY, network="msdnet-tiny"))
    assert row.measured > 0 and row.limit == 0.9


def test_layouts_are_printed_as_a_table(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--networks", "msdnet-tiny", "--batch", "4", "--rounds", "1"], command=layouts)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| msdnet-tiny | ")


def test_json_is_a_list_of_targets_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--only", "evaluation,gpu", "--rounds", "1", "--json"], command=speed)
    assert not end.value.code
    rows = json.loads(capsys.readouterr().out)
    assert all(row.keys() == {"target", "limit", "measured", "ci", "verdict"} for row in rows)
    assert [row["verdict"] for row in rows[1:]] == ["not-run"] * 3 or torch.cuda.is_available()


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--only", "step"], "did you mean steps"), (["--only", ","], "empty"), (["--rounds", "0"], "at least 1")],
)
def test_mistakes_are_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as end:
        main(words, command=speed)
    assert end.value.code == 2 and told in capsys.readouterr().err
    assert next(iter(PARTS)) == "steps"


def test_what_was_measured_once_has_no_interval():
    assert judged("once", 2.0, Ratio(1.0, 1.0, 1.0, 1.0)).ci is None
    assert judged("often", 2.0, Ratio(1.0, 0.9, 1.1, 1.0)).ci == (0.9, 1.1)
