"""Fine-tuning: AdamW, a rate per part, warm-up, mixed images and averaged weights, against values from elsewhere."""

import math

import pytest
import torch
from torch import nn

import exitkit
from exitkit import Recipe
from exitkit.files import load_tensors
from exitkit.runs.recipe import FINE_TUNING, SETTABLE
from exitkit.strategy import Phase
from exitkit.strategy.position import Position
from exitkit.training import batches, loop
from exitkit.training.batches import learning_rate
from exitkit.training.finetuning import WeightAverage, make_mix, make_optimizer

from toy import FEW, FEW_OPTIONS, chain

OPTIONS = {
    "optimizer": "adamw",
    "warmup": 0.5,
    "trunk_lr_factor": 0.1,
    "mixup": 0.4,
    "cutmix": 1.0,
    "weight_ema": 0.9,
}
FAST = {"epochs": 2, "lr": 0.01, **FEW}


def resolved(**values):
    return Recipe.make(**FAST | values).resolve()


def weights(run):
    return load_tensors(run.path / "weights.safetensors")


def test_options_have_no_part_in_the_identity_until_they_are_used():
    base = resolved()
    assert not base.identity().keys() & set(FINE_TUNING) and OPTIONS.keys() == set(FINE_TUNING) <= SETTABLE
    others = [resolved(**{key: value}) for key, value in OPTIONS.items()]
    assert len({base.id, *(recipe.id for recipe in others)}) == len(OPTIONS) + 1
    typed = Recipe.make(**FAST).with_settings({"training.warmup": "0.5", "milestones": "0.2,0.6", "mixup": "1"})
    assert (typed.warmup, typed.milestones, typed.mixup) == (0.5, (0.2, 0.6), 1.0)


def test_adamw_makes_the_steps_of_its_paper_with_a_rate_per_part():
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, algorithm 2; the trunk at a tenth."""
    network = chain(2)
    recipe = resolved(optimizer="adamw", trunk_lr_factor=0.1, momentum=0.8, weight_decay=0.05)
    optimizer = make_optimizer(recipe, Phase("train", exitkit.build_strategy("joint"), 2), network)
    assert next(network.named_parameters())[0].startswith("stages.")
    ours = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in ours.items()} for _ in range(2))
    for step in (1, 2, 3):
        rate = 0.01 / step
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        for name, parameter in network.named_parameters():
            parameter.grad = gradient = torch.randn_like(parameter)
            lr = rate * (0.1 if name.startswith("stages.") else 1)
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            scale = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            ours[name] = ours[name] - lr * 0.05 * ours[name] - lr * first[name] / (1 - 0.8**step) / scale
        optimizer.step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), ours[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_warm_up_has_the_rates_of_torch_schedulers(schedule):
    epochs, steps, warmup = 5, 8, 1.5
    recipe = Recipe.make(lr=0.3, schedule=schedule, milestones=(), warmup=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=12)
    rest = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps - 12),
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    }
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, rest[schedule]()], [12])
    for number in range(epochs * steps):
        at = Position(epoch=number // steps, step=number % steps, epochs=epochs, steps=steps)
        assert learning_rate(recipe, at) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), number
        optimizer.step(), scheduler.step()


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_the_loss_of_mixed_images_is_the_weighted_sum_of_two(key):
    torch.manual_seed(3)
    images, labels = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.randint(4, (6,))
    mixed, shares = make_mix(resolved(**{key: 1.0}), 4)(images, labels)
    partner_images, partners = images.roll(1, 0), labels.roll(1)
    different = int((partners != labels).nonzero()[0])
    share = float(shares[different, labels[different]])
    assert 0 < share < 1
    if key == "mixup":
        torch.testing.assert_close(mixed, share * images + (1 - share) * partner_images, rtol=1e-6, atol=1e-6)
    else:
        pasted = mixed != images
        assert torch.equal(mixed[pasted], partner_images[pasted])
        assert float(pasted[different].double().mean()) == pytest.approx(1 - share)
    strategy, logits = exitkit.build_strategy("joint", label_smoothing=0.1), torch.randn(6, 4, dtype=torch.float64)
    two = share * strategy.cross_entropy(logits, labels) + (1 - share) * strategy.cross_entropy(logits, partners)
    torch.testing.assert_close(strategy.cross_entropy(logits, shares.double()), two, rtol=1e-6, atol=1e-6)


def test_the_average_of_weights_is_its_closed_form():
    network, decay = chain(2, batchnorm=True), 0.7
    run = exitkit.Run.local(network, exitkit.build_strategy("joint"), torch.optim.SGD(network.parameters(), 0.1))
    average, seen = WeightAverage(run, decay), []
    for _ in range(4):
        run.train_step((torch.randn(6, 1, 2, 2, dtype=torch.float64), torch.randint(4, (6,))))
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
    shares = [decay**3, *((1 - decay) * decay ** (3 - number) for number in (1, 2, 3))]
    assert sum(shares) == pytest.approx(1)
    for name, tensor in average.network.state_dict().items():
        if tensor.is_floating_point():
            expected = sum(share * state[name] for share, state in zip(shares, seen, strict=True))
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)
    average.end()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in average.network.state_dict().items())


def test_the_average_is_what_is_validated_and_kept(tmp_path, monkeypatch):
    """With a decay near 1 the average stays at the weights after the first step, whatever the others do."""
    first, plain = {}, loop.EpochBatches.__iter__

    def watch(self):
        for number, batch in enumerate(plain(self)):
            if number == 1 and not first:
                first.update({name: tensor.clone() for name, tensor in self._run.network.state_dict().items()})
            yield batch

    monkeypatch.setattr(batches.EpochBatches, "__iter__", watch)
    run = exitkit.train({**FAST, "weight_ema": 1 - 1e-9}, tmp_path)
    for name, tensor in weights(run).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, first[name], rtol=1e-5, atol=1e-6, msg=name)
    losses = run.metrics()
    assert losses.validation_loss_1.nunique() == 1 and losses.train_loss_1.nunique() == 2


@pytest.mark.parametrize("method", ["l2w", "imta"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(method, tmp_path, monkeypatch):
    options = {key: value for key, value in OPTIONS.items() if method != "l2w" or key != "optimizer"}
    recipe = {**FAST, "method": method, **options, "method_settings": {"label_smoothing": 0.1}}
    whole = exitkit.train(recipe, tmp_path / "whole")
    plain = loop._end_epoch

    def stop(training, begun, *rest):
        plain(training, begun, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_end_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        exitkit.train(recipe, tmp_path / "cut")
    monkeypatch.undo()
    resumed = exitkit.train(recipe, tmp_path / "cut", resume=True)
    assert resumed.path.name == whole.path.name
    for name in ("weights.safetensors", "outputs-test.safetensors", "metrics.csv"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert all(math.isfinite(value) for value in whole.metrics().validation_loss_1)


@pytest.mark.parametrize("method", ["hdkd", "metagf", "pcgrad", "heads"])
def test_methods_train_with_every_option_that_they_do_not_refuse(method, tmp_path):
    refused = exitkit.build_strategy(method).refuses()
    options = {key: value for key, value in OPTIONS.items() if key not in refused}
    if method == "heads":
        options = {key: options[key] for key in ("optimizer", "warmup", "weight_ema")}
    run = exitkit.train({**FAST, "epochs": 1, "method": method, **options}, tmp_path)
    assert math.isfinite(run.metrics().validation_loss_1[0])


def test_show_prints_the_options(cli):
    printed = cli("train", "--epochs", "2", "--set", "warmup=0.5", "--set", "weight_ema=0.9", *FEW_OPTIONS)
    assert printed.code == 0, printed.errors
    (folder,) = exitkit.load_runs("runs").run.unique()
    assert "warmup=0.5, weight_ema=0.9" in cli("show", f"runs/{folder}").out
