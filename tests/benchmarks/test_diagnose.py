"""Probes, diagnostics and their figures."""

import base64
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import exitkit
from exitkit.benchmarks.diagnose import figures
from exitkit.benchmarks.diagnose.measures import pruning_damage, rank_consistency
from exitkit.benchmarks.diagnose.toy import START, gradient_methods, losses, path
from exitkit.data.base import Batch
from exitkit.files import load_tensors
from exitkit.plugins import registered
from exitkit.training.probe import CHUNKS, probe

from toy import FEW, batches, chain, exit_gradients, sgd

SHORT = {"epochs": 3, "lr": 0.05, **FEW}


def probed(method="joint", size=16, batchnorm=False, **settings):
    network, (x, y) = chain(batchnorm=batchnorm), batches(1, size=size)[0]
    run = exitkit.Run.local(network, exitkit.build_strategy(method, **settings), sgd(network))
    return run, (x, y), probe(run, Batch(x, y))


def test_a_probe_is_the_exits_gradients_stage_by_stage():
    run, (x, y), seen = probed()
    rows = exit_gradients(run.network, x, y)
    for stage in range(3):
        names = [name for name, _ in run.network.named_parameters() if name.startswith(f"stages.{stage}.")]
        for a in range(3):
            for b in range(3):
                if min(a, b) < stage:
                    assert seen["cosine"][stage, a, b].isnan()
                    continue
                one, other = (torch.cat([rows[k][name].flatten() for name in names]) for k in (a, b))
                assert seen["cosine"][stage, a, b].item() == pytest.approx(
                    F.cosine_similarity(one, other, dim=0).item(), abs=1e-5
                )
                assert seen["norm"][stage, a].item() == pytest.approx(one.norm().item(), rel=1e-5)


def test_the_variance_is_that_of_parts_of_the_batch_and_valid_images_are_not_sure_yet():
    run, (x, y), seen = probed()
    parts = [exit_gradients(run.network, xs, ys) for xs, ys in zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True)]
    names = [name for name, _ in run.network.named_parameters() if name.startswith("stages.1.")]
    totals = torch.stack(
        [torch.cat([sum(r[n] for r in part if r[n] is not None).flatten() for n in names]) for part in parts]
    )
    assert seen["total_variance"][1].item() == pytest.approx(totals.var(0).sum().item(), rel=1e-5)
    assert seen["total_norm"][1].item() == pytest.approx(totals.mean(0).norm().item(), rel=1e-5)
    chances = torch.stack([z.softmax(1) for z in run.network(x).logits], 1)[torch.arange(16), :, y]
    assert seen["valid"].tolist() == pytest.approx((chances < 0.9).double().mean(0).tolist())
    assert torch.allclose(seen["losses"].double(), -chances.log(), rtol=1e-5)


@pytest.mark.parametrize("method", ["joint", "l2w", "boostnet", "kd", "mgda+ofa"])
def test_a_probe_moves_nothing_and_draws_nothing(method):
    network, (x, y) = chain(batchnorm=True), batches(1, size=16)[0]
    run = exitkit.Run.local(network, exitkit.build_strategy(method), sgd(network))
    run.strategy.train_step(run, (x, y))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    state = torch.random.get_rng_state()
    seen = probe(run, Batch(x, y))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    after = [p.grad for p in network.parameters()]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, after, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert ("weights" in seen) == (method == "l2w")
    if "weights" in seen:
        assert torch.allclose(seen["weights"].mean(1), torch.ones(16), atol=1e-6)


def test_a_run_with_probes_is_the_run_without_and_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    plain = exitkit.train({"method": "imta", **SHORT}, tmp_path)
    run = exitkit.train({"method": "imta", "probe_every": 2, **SHORT}, tmp_path)
    assert run.path != plain.path
    a, b = (load_tensors(each.path / "weights.safetensors") for each in (plain, run))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert run.probes()["epoch"].tolist() == [2, 4] and not plain.probes()
    from exitkit.training import loop as training

    real, calls = training._end_epoch, []

    def cut(*arguments):
        real(*arguments)
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power cut")

    monkeypatch.setattr(training, "_end_epoch", cut)
    recipe = {"method": "imta", "probe_every": 2, **SHORT}
    with pytest.raises(RuntimeError, match="power cut"):
        exitkit.train(recipe, tmp_path / "cut")
    again = exitkit.train(recipe, tmp_path / "cut")
    for name, value in run.probes().items():
        assert np.array_equal(value, again.probes()[name], equal_nan=True), name


def test_rank_consistency_is_spearmans():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 3, 4))
    logits[:, 2] = logits[:, 0] * 3  # another temperature, and so other confidences, in the same order
    found = rank_consistency(logits)
    sure = np.exp(logits).max(2) / np.exp(logits).sum(2)
    places = sure.argsort(0).argsort(0)
    assert found[0, 1] == pytest.approx(np.corrcoef(places[:, 0], places[:, 1])[0, 1])
    assert np.allclose(np.diag(found), 1)


def test_gradient_taps_do_not_change_what_matters():
    network, (x, y) = chain(), batches(1, size=40)[0]
    plain = pruning_damage(network, x, y, x, y, share=0.2)
    exitkit.build_strategy("dfs").adapt(network)
    taps = list(network.taps)
    assert np.array_equal(pruning_damage(network, x, y, x, y, share=0.2), plain) and network.taps == taps


def test_pruning_takes_what_matters_and_leaves_the_network_as_it_was():
    network, (x, y) = chain(), batches(1, size=40)[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    damage = pruning_damage(network, x, y, x, y, share=0.2)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training and all(p.requires_grad for p in network.parameters())
    shared = ["stages.0.1.weight", "stages.0.1.bias"]
    whole = [100 * (z.argmax(1) == y).double().mean().item() for z in network(x).logits]
    for index, row in enumerate(exit_gradients(network, x, y)):
        flat = torch.cat([(row[name] * before[name]).abs().flatten() for name in shared])
        gone = torch.zeros_like(flat, dtype=torch.bool)
        gone[flat.topk(round(0.2 * len(flat))).indices] = True
        values = torch.cat([before[name].flatten() for name in shared]).masked_fill(gone, 0)
        twin = chain()
        twin.load_state_dict(before | {shared[0]: values[:20].view(5, 4), shared[1]: values[20:]})
        left = [100 * (z.argmax(1) == y).double().mean().item() for z in twin(x).logits]
        assert damage[index].tolist() == pytest.approx([a - b for a, b in zip(whole, left, strict=True)])


def test_diagnose_draws_all_and_says_how_to_get_what_it_lacks(cli, tmp_path):
    run = exitkit.train({"method": "l2w", "probe_every": 1, **SHORT}, tmp_path)
    assert cli("diagnose", run.path).code == 0
    names = ("conflict", "magnitude", "validity", "weights", "ranks", "pruning")
    files = {path.name for path in (run.path / "diagnostics").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "pdf", "csv")}
    table = pd.read_csv(run.path / "diagnostics" / "conflict.csv")
    assert len(table) == 3 * 4 * 4 * 4 and table.epoch.max() == 3
    assert table[(table.exit == table.other) & (table.stage == 1)].cosine.tolist() == pytest.approx([1.0] * 12)
    plain = exitkit.train({"method": "joint", **SHORT}, tmp_path)
    there = tmp_path / "there"
    done = cli("diagnose", plain.path, "--out", there, "--json")
    assert done.code == 0 and "--probe-every 1" in done.errors
    assert json.loads(done.out) == {name: str(there / f"{name}.png") for name in ("ranks", "pruning")}
    assert (there / "ranks.png").exists()

    assert cli("report", tmp_path, "--format", "md,latex,html,pdf,png").code == 0
    report = tmp_path / "report"
    markdown, tex, page = ((report / f"report.{kind}").read_text() for kind in ("md", "tex", "html"))
    for name in names:
        picture = f"{name}-{run.path.name}"
        for kind in ("png", "pdf"):
            copied, drawn = report / f"{picture}.{kind}", run.path / "diagnostics" / f"{name}.{kind}"
            assert copied.read_bytes() == drawn.read_bytes()
        assert f"]({picture}.png)" in markdown and f"{{{picture}.pdf}}" in tex
        assert base64.b64encode((report / f"{picture}.png").read_bytes()).decode() in page
    assert "joint on msdnet-tiny, digits, seed 0:" not in markdown  # nobody diagnosed it into its own folder


@pytest.mark.parametrize("arguments", [[], ["."], ["--toy", "."]])
def test_what_diagnose_can_not_draw_is_said_in_one_line(arguments, cli):
    cli("diagnose", *arguments).refused()


@pytest.mark.parametrize("option", [("--share", "0.02"), ("--data-dir", "data")])
def test_options_of_a_run_are_refused_with_the_toy_problem(option, cli, tmp_path):
    cli("diagnose", "--toy", *option).refused(f"{option[0]} has no effect on --toy")
    assert not list(tmp_path.iterdir())


def test_on_the_toy_problem_the_exits_conflict_and_every_method_gets_somewhere(tmp_path):
    w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    one, other = (torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses(w))
    assert F.cosine_similarity(one, other, dim=0) < -0.1
    methods = gradient_methods(registered("method"))
    assert {"joint", "ge", "metagf", "pcgrad", "cagrad", "mgda"} <= set(methods) and "l2w" not in methods
    for method in ("joint", "metagf", "pcgrad", "mgda"):
        points = path(method)
        assert points[0].tolist() == list(START)
        start, end = (sum(losses(torch.from_numpy(points[i]))).item() for i in (0, -1))
        assert end < start
    assert np.array_equal(path("graddrop"), path("graddrop"))


def test_the_share_of_valid_images_ends_at_a_hundred_and_its_legend_covers_nothing():
    probes = {"epoch": np.array([1, 2]), "valid": np.ones((2, 10)), "loss": np.ones((2, 10))}
    figure = figures.validity_figure(probes)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert figure.axes[0].get_ylim()[1] <= 101
    assert all(legend.get_window_extent().y0 >= axes.get_window_extent().y1 for axes in figure.axes)
