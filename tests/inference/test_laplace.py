"""Last-layer Laplace: against closed forms in float64, in its limits, and deployed as it is evaluated."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import exitkit
from exitkit import ExitPolicy
from exitkit.errors import UserError
from exitkit.inference.combinations import fit_combination
from exitkit.inference.export import runner
from exitkit.inference.export.export import export
from exitkit.inference.laplace import LAPLACE, Laplace, _LastLayer, _log_mean_softmax, _Objective, fit_laplace
from exitkit.inference.outputs import Embeddings, ExitOutputs
from exitkit.inference.policy import cross_fit, fit_policy, read_policy
from exitkit.inference.rules.base import Validation
from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.runs.embeddings import Moments

COSTS = [1.0, 2.0, 4.0]


def network(dtype=torch.float64):
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU())]
    stages.append(nn.Conv2d(5, 4, 3, 2))
    pool = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) for _ in range(3)]
    heads = [Head(part, nn.Linear(width, 3)) for part, width in zip(pool, (4, 5, 4), strict=True)]
    made = MultiExitNetwork(stages, heads, (1, 8, 8), 3).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made.to(dtype)


def images(count, seed):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


@torch.inference_mode()
def outputs_of(made, x, curvature):
    found = made(x)
    parts = tuple(part.numpy() for part in found.embeddings)
    return ExitOutputs(torch.stack(found.logits, 1).numpy(), Embeddings(parts, curvature))


@torch.no_grad()
def curvature_of(made, x, count=None):
    moments = Moments(made)
    for batch in x.split(17):
        moments.add(made(batch))
    arrays = {name: tensor.numpy() for name, tensor in moments.curvature().items()}
    return arrays | ({} if count is None else {"images": np.array([count])})


@pytest.fixture(scope="module")
def made():
    return network()


@pytest.fixture(scope="module")
def validation(made):
    """Outputs of which the exits are more often right than chance; four training images, so that much is uncertain."""
    outputs = outputs_of(made, images(150, 2), curvature_of(made, images(40, 1), count=4))
    last = outputs.logits[:, -1]
    labels = (last + np.random.default_rng(0).normal(size=last.shape) * last.std()).argmax(axis=1)
    return Validation(outputs, labels, np.array(COSTS))


# The curvature


def test_the_curvature_of_one_image_is_the_hessian_of_its_loss(made):
    """In the weights and biases of an exit's linear layer, exactly; the Hessian does not depend on the label."""
    x = images(1, 5)
    found = curvature_of(made, x)
    for k, head in enumerate(made.heads, start=1):
        e = made(x).embeddings[k - 1].detach()

        def loss(weights, e=e):
            return nn.functional.cross_entropy((weights @ torch.cat([e[0], e.new_ones(1)]))[None], torch.tensor([1]))

        weights = torch.cat([head.classify.weight, head.classify.bias[:, None]], 1).detach()
        hessian = torch.autograd.functional.hessian(loss, weights).reshape(weights.numel(), -1).numpy()
        np.testing.assert_allclose(np.kron(found[f"outputs_{k}"], found[f"features_{k}"]), hessian, atol=1e-12)


def test_the_curvature_is_the_mean_over_images_and_does_not_depend_on_batches(made):
    x = images(40, 1)
    whole = curvature_of(made, x)
    each = [curvature_of(made, x[number : number + 1]) for number in range(40)]
    assert whole["images"] == [40]
    for name in whole.keys() - {"images"}:
        np.testing.assert_allclose(whole[name], np.mean([one[name] for one in each], axis=0), rtol=1e-12, atol=1e-15)


# The posterior


def test_draws_and_roots_have_the_covariances_of_the_posterior(made, validation):
    """U^-1 and V^-1, inverted directly."""
    curvature = validation.outputs.embeddings.curvature
    for k in range(3):
        layer = _LastLayer.make(curvature, k, validation.outputs.embeddings.parts[k], 3)
        for v in (0.5, 1.7):
            u, full = (
                math.sqrt(4) * curvature[f"{kind}_{k + 1}"] + np.eye(size) / math.sqrt(v)
                for kind, size in (("outputs", 3), ("features", len(layer.v)))
            )
            eps = np.random.default_rng(0).standard_normal((50, 3))
            root = np.linalg.lstsq(eps, layer.noise(math.log(v)).numpy(), rcond=None)[0]
            np.testing.assert_allclose(root.T @ root, np.linalg.inv(u), rtol=1e-10)
            np.testing.assert_allclose(root, root.T, atol=1e-12)
            right = layer.root(math.log(v))
            np.testing.assert_allclose(right @ right.T, np.linalg.inv(full), rtol=1e-9)
            phi = np.concatenate([validation.outputs.embeddings.parts[k], np.ones((150, 1))], axis=1)
            expected = np.sqrt(np.einsum("ni,ij,nj->n", phi, np.linalg.inv(full), phi))
            np.testing.assert_allclose(layer.spread(math.log(v), slice(None)), expected, rtol=1e-9)


@pytest.mark.parametrize("name", LAPLACE)
def test_outputs_equal_the_formula_computed_sample_by_sample(name, validation):
    fitted = fit_laplace(name, validation)
    combined = np.exp(fitted(validation.outputs))
    curvature, parts = validation.outputs.embeddings.curvature, validation.outputs.embeddings.parts
    eps = np.random.default_rng(0).standard_normal((50, 3))
    for number in (0, 77, 149):
        q = []
        for k in range(3):
            v = fitted.variances[k]
            u = math.sqrt(4) * curvature[f"outputs_{k + 1}"] + np.eye(3) / math.sqrt(v)
            values, vectors = np.linalg.eigh(np.linalg.inv(u))
            phi = np.append(parts[k][number], 1.0)
            full = math.sqrt(4) * curvature[f"features_{k + 1}"] + np.eye(len(phi)) / math.sqrt(v)
            spread = math.sqrt(phi @ np.linalg.solve(full, phi))
            z = validation.logits[number, k] + spread * eps @ (vectors * np.sqrt(values)) @ vectors.T
            e = np.exp(z / fitted.temperatures[k])
            q.append((e / e.sum(axis=1, keepdims=True)).mean(axis=0))
            expected = q[k] if name == "laplace" else np.average(q, axis=0, weights=COSTS[: k + 1])
            np.testing.assert_allclose(combined[number, k], expected, rtol=1e-9)


def test_the_mean_over_many_draws_is_the_integral_over_the_gaussian():
    """Two classes: the mean of a sigmoid under a normal distribution, by Gauss-Hermite quadrature."""
    z, spread, temperature = torch.tensor([[0.8, -0.3]]).double(), torch.tensor([1.5]).double(), 0.7
    covariance = np.array([[0.9, 0.2], [0.2, 0.5]])
    eps = np.random.default_rng(1).standard_normal((200_000, 2))
    noise = torch.from_numpy(np.concatenate([eps, -eps]) @ np.linalg.cholesky(covariance).T)
    found = _log_mean_softmax(z, spread, noise, temperature).exp()[0, 0]
    knots, weights = np.polynomial.hermite_e.hermegauss(60)
    size = 1.5 * math.sqrt(0.9 + 0.5 - 0.4)
    expected = weights @ (1 / (1 + np.exp(-(1.1 + size * knots) / temperature))) / weights.sum()
    assert float(found) == pytest.approx(expected, abs=1e-3)


# Limits, and the fit


@pytest.mark.parametrize(("name", "without"), [("laplace", "calibrated"), ("mie-laplace", "mie")])
def test_with_endless_training_images_nothing_but_temperatures_remains(name, without, made, validation):
    outputs = outputs_of(made, images(150, 2), curvature_of(made, images(40, 1), count=10**30))
    certain = validation._replace(outputs=outputs)
    expected = fit_combination(without, certain.logits, certain.labels, COSTS)
    fitted = fit_laplace(name, certain)
    np.testing.assert_allclose(fitted.temperatures, expected.temperatures, rtol=2e-3)
    exact = Laplace(name, fitted.noise, fitted.roots, expected.temperatures, fitted.variances, fitted.weights)
    np.testing.assert_allclose(exact(outputs), expected(outputs.logits), atol=1e-6)


def test_a_single_exit_gives_the_same_for_both(made, validation):
    one = ExitOutputs(
        validation.logits[:, :1],
        validation.outputs.embeddings._replace(parts=validation.outputs.embeddings.parts[:1]),
    )
    both = [fit_laplace(name, Validation(one, validation.labels, np.array([3.0])))(one) for name in LAPLACE]
    np.testing.assert_allclose(both[0], both[1], atol=1e-4)


def test_gradients_of_the_loss_equal_finite_differences(validation):
    embeddings = validation.outputs.embeddings
    layer = _LastLayer.make(embeddings.curvature, 1, embeddings.parts[1], 3)
    z, labels = torch.from_numpy(validation.logits[:, 1].copy()), torch.from_numpy(validation.labels)
    before = torch.from_numpy(np.random.default_rng(3).uniform(-3, -0.5, 150))
    for earlier in (None, before):
        objective = _Objective(layer, z, labels, 0.3, earlier)
        at, step = np.array([0.4, -0.2]), 1e-6
        gradient = objective.loss(at)[1]
        for axis in range(2):
            shift = step * np.eye(2)[axis]
            numeric = (objective.loss(at + shift)[0] - objective.loss(at - shift)[0]) / (2 * step)
            assert gradient[axis] == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("name", LAPLACE)
def test_no_variance_and_temperature_of_the_papers_grids_is_better(name, validation):
    fitted, embeddings = fit_laplace(name, validation), validation.outputs.embeddings
    labels, before = torch.from_numpy(validation.labels), None
    for k in range(3):
        layer = _LastLayer.make(embeddings.curvature, k, embeddings.parts[k], 3)
        weight = math.log(COSTS[k]) if name == "mie-laplace" else 0.0
        earlier = before if name == "mie-laplace" else None
        objective = _Objective(layer, torch.from_numpy(validation.logits[:, k].copy()), labels, weight, earlier)
        best = math.log(fitted.variances[k]), math.log(fitted.temperatures[k])
        grid = [(v, t) for v in (0.5, 0.7, 1, 1.5, 2, 3, 4) for t in (0.3, 0.5, 0.7, 1, 1.3, 1.7, 2, 3)]
        assert objective.loss(best)[0] <= min(objective.loss(np.log(point))[0] for point in grid) + 1e-7
        before = objective.of_labels(*best)


@pytest.mark.parametrize("name", LAPLACE)
def test_an_exit_reads_no_later_exit_and_a_sample_no_other_sample(name, validation):
    fitted, outputs = fit_laplace(name, validation), validation.outputs
    combined = fitted(outputs)
    changed = outputs.logits.copy()
    changed[:, 2] *= -1
    np.testing.assert_array_equal(fitted(ExitOutputs(changed, outputs.embeddings))[:, :2], combined[:, :2])
    for rows in (np.array([3]), np.arange(149, 100, -1)):
        np.testing.assert_allclose(fitted(outputs.rows(rows)), combined[rows], rtol=1e-12, atol=1e-12)


# Deployment


@pytest.mark.parametrize("name", ["laplace", "mie-laplace", "mie-laplace+margin+stopping", "laplace+agreement"])
def test_adaptive_inference_decides_as_the_evaluation(name, made, validation):
    policy = fit_policy(name, validation.logits, validation.labels, COSTS, validation.outputs.embeddings)
    x = images(60, 7)
    outputs = outputs_of(made, x, validation.outputs.embeddings.curvature)
    leaves, combined = policy.leave_at(outputs), policy.outputs(outputs).logits
    for point in {0, policy.points // 2, policy.points - 1}:
        one = policy.at(point)
        again = ExitPolicy.from_json(one.to_json())
        assert again.to_json() == one.to_json() and again.exits == 3
        found = again.on_outputs(torch.from_numpy(outputs.logits), outputs.embeddings)
        np.testing.assert_array_equal(found[1], leaves[point])
        for settings in ({}, {"buckets": (8, 64)}, {"engine": "folded"}):
            answers = exitkit.AdaptiveInference(made, again, **settings)(x)
            np.testing.assert_array_equal(answers.exits, leaves[point])
            np.testing.assert_allclose(answers.logits, combined[np.arange(60), leaves[point]], rtol=1e-8, atol=1e-8)
        streamed = list(exitkit.AdaptiveInference(made, again).stream(x.split([7, 20, 33]), 16))
        np.testing.assert_array_equal(torch.cat([part.exits for part in streamed]), leaves[point])
    assert type(made.link).__name__ == "LogitLink"


@pytest.mark.parametrize("form", [pytest.param("onnx", marks=pytest.mark.full), "torch-export"])
def test_exported_programs_decide_as_the_evaluation(form, tmp_path, validation):
    single = network(torch.float32)
    policy = fit_policy("mie-laplace", validation.logits, validation.labels, COSTS, validation.outputs.embeddings)
    one = policy.at(policy.points // 2)
    written = export(single, one, tmp_path / "out", images(12, 3).float(), {"costs": [{"exit": 1}]}, form)
    assert "combination" not in written
    x = images(40, 8).float()
    outputs, exits = runner.Runner(tmp_path / "out")(x.numpy())
    stored = outputs_of(single, x, validation.outputs.embeddings.curvature)
    expected = one.on_outputs(torch.from_numpy(stored.logits), stored.embeddings)
    np.testing.assert_array_equal(exits, expected[1])
    np.testing.assert_allclose(outputs, expected[0], rtol=1e-3, atol=1e-4)
    assert len(set(exits)) > 1


def test_cross_fitting_fits_variances_and_temperatures_on_other_samples(validation):
    (result,) = cross_fit([read_policy("laplace")], validation)
    held = np.random.default_rng(0).permutation(150) % 5 == 3
    fitting, measured = validation.rows(np.flatnonzero(~held)), validation.rows(np.flatnonzero(held))
    policy = fit_policy("laplace", fitting.logits, fitting.labels, COSTS, fitting.outputs.embeddings)
    agree = (policy.leave_at(measured.outputs) == result.leaves[:, held]).mean()
    assert agree > 0.99  # the searches start at different values


# Faults


def test_what_laplace_can_not_do_is_refused_in_one_line(made, validation):
    outputs = ExitOutputs(validation.logits)
    with pytest.raises(UserError, match="which `exitkit evaluate RUN --embeddings` stores; these are outputs alone"):
        fit_laplace("laplace", validation._replace(outputs=outputs))
    with pytest.raises(UserError, match=r"laplace reads the embeddings of a run"):
        ExitPolicy.from_outputs("laplace", *map(torch.from_numpy, (validation.logits, validation.labels)), COSTS)
    fitted = fit_laplace("laplace", validation)
    boosted = network()
    exitkit.build_strategy("boostnet").adapt(boosted)
    with pytest.raises(UserError, match="has the logit link BoostedLink; last-layer Laplace needs exits that end in"):
        fitted.linked(boosted)
    twisted = network()
    twisted.heads[1].classify = nn.Sequential(twisted.heads[1].classify)
    with pytest.raises(UserError, match="exit 2 ends in Sequential; last-layer Laplace needs"):
        Moments(twisted)
    wider = network()
    wider.heads[0] = Head(nn.Flatten(), nn.Linear(256, 3).double())
    with pytest.raises(UserError, match=r"3 classes and embeddings of \[4, 5, 4\] values; expected a network of these"):
        fitted.linked(wider)
    policy = ExitPolicy(exitkit.ExitRule("confidence", (0.5, 0.5, -math.inf)), fitted)
    with pytest.raises(UserError, match="give the engine by its name"):
        exitkit.AdaptiveInference(made, policy, engine=exitkit.AdaptiveInference(made, policy.rule).engine)
    with pytest.raises(UserError, match="expected the policy that placed_in returns"):
        policy.decide(0, torch.zeros(1, 3))
    broken = outputs_of(made, images(4, 2), validation.outputs.embeddings.curvature)
    broken.logits[1, 0, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fitted(broken)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "laplac"},
        {"temperatures": [1.0, 1.0]},
        {"temperatures": [1.0, 0.0, 1.0]},
        {"noise": 3},
        {"roots": [{"shape": [1, 2], "values": [1, 2]}] * 3},
        {"weights": [1.0, 1.0, 1.0]},
    ],
)
def test_damaged_text_is_refused(change, validation):
    text = json.dumps(json.loads(fit_laplace("laplace", validation).to_json()) | change)
    with pytest.raises(UserError):
        Laplace.from_json(text)
