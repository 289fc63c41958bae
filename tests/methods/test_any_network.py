"""Every method on networks with frozen parameters, shared modules and shared parameters: it trains what it should."""

import pytest
import torch
from torch import nn

import exitkit
from exitkit.files import load_tensors
from exitkit.networks.attach.exits import attach_exits
from exitkit.networks.ownership import owners
from exitkit.plugins import registered
from exitkit.runs import job
from exitkit.strategy.functional import call

from toy import FEW

AGGREGATORS = {"cagrad", "mgda", "imtlg", "nashmtl", "aligned", "graddrop", "upgrad", "dualproj", "config"}
"""Functions of the matrix of gradients: PCGrad, which runs always, shows how the matrix is made."""


class Small(nn.Module):
    """Four convolutions with batch norm; `shared`: the second and the third are one module; `tied`: one parameter."""

    def __init__(self, shared=False, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Conv2d(1, 4, 3), conv(), conv(), conv()
        if shared:
            self.c = self.b
        if tied:
            self.c[0].weight = self.b[0].weight
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.c(self.b(self.a(x)))
        return self.fc(self.d(x).mean((2, 3)))


def conv():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def network_of(case):
    model = Small(shared=case == "shared", tied=case == "tied")
    if case == "frozen":
        model.a.requires_grad_(False)
        model.b.requires_grad_(False)
    if case == "frozen whole":
        model.requires_grad_(False)
    return attach_exits(model, at=["a", "b.2", "b.2_1" if case == "shared" else "c"], input_shape=(1, 8, 8))


def batches(count=2, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


CASES = [(case, "fp32") for case in ("frozen", "frozen whole", "shared", "tied")] + [("frozen", "fp16")]


@pytest.mark.parametrize(("case", "precision"), CASES)
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.full] * (m in AGGREGATORS)) for m in registered("method")]
)
def test_every_method_trains_what_is_not_frozen(method, case, precision):
    network = network_of(case)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9)
    run = exitkit.Run.local(network, method, optimizer, precision=precision)
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    fixed = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    run.train_epoch(batches())
    after = dict(network.named_parameters())
    assert [name for name, _ in network.named_parameters(remove_duplicate=False)] == names
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in fixed)
    assert all(tensor.isfinite().all() for tensor in after.values())
    still = {name for name in before.keys() - fixed if torch.equal(before[name], after[name])}
    # A bias before batch norm has no effect, and links replace the last layer of heads, which nothing reads then.
    read = {name for name, exits in owners(network).items() if exits}
    assert all(name.endswith(".0.bias") or name.startswith("link.") or name not in read for name in still), still
    assert len(still) < len(before) - len(fixed)
    assert all(after[name].isfinite().all() for name in before)
    assert all(type(parameter) is nn.Parameter for parameter in after.values())


@pytest.mark.parametrize("case", ["shared", "tied"])
def test_replaced_tensors_reach_every_module_that_shares_them_and_are_restored(case):
    network = network_of(case).double()
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    named = dict(network.named_parameters(remove_duplicate=False))
    other = {name: (1.1 * tensor.detach()).requires_grad_() for name, tensor in network.named_parameters()}
    loss = sum(logits.square().sum() for logits in call(network, other, images).logits)
    replaced = torch.autograd.grad(loss, list(other.values()))
    assert all(tensor is dict(network.named_parameters(remove_duplicate=False))[name] for name, tensor in named.items())
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.mul_(1.1)
    expected_loss = sum(logits.square().sum() for logits in network(images).logits)
    expected = torch.autograd.grad(expected_loss, list(network.parameters()))
    torch.testing.assert_close(replaced, expected)


@pytest.mark.parametrize("case", ["frozen", "shared", "tied"])
def test_branches_side_by_side_equal_branches_one_by_one(case):
    ends = []
    for branches in ("one-by-one", "side-by-side"):
        network = network_of(case).double()
        strategy = exitkit.build_strategy("metagf", branches=branches)
        run = exitkit.Run.local(network, strategy, torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=1e-2))
        run.train_epoch([(images.double(), labels) for images, labels in batches()])
        ends.append(network.state_dict())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("method", ["separate", "boostnet"])
def test_a_run_trains_no_parameter_that_its_network_holds_frozen(method, monkeypatch, tmp_path):
    made, make = [], job.make_network

    def with_frozen_stem(*args, **options):
        network = make(*args, **options)
        network.stages[0].requires_grad_(False)
        made.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return network

    monkeypatch.setattr(job, "make_network", with_frozen_stem)
    run = exitkit.train({"method": method, "epochs": 2, "backbone": "msdnet-tiny", **FEW}, tmp_path)
    after = load_tensors(run.path / "weights.safetensors")
    moved = {name for name, tensor in made[0].items() if not torch.equal(tensor, after[name])}
    assert moved and not any(name.startswith("stages.0.") for name in moved)  # nor running statistics
    assert any(name.startswith("stages.1.") and name.endswith("running_mean") for name in moved)
