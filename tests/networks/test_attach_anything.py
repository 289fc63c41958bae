"""Exits on networks whose forward does more than compute: the cascade does the same, or a line says why not.

Each network is compared with a copy of itself that nothing was attached to, over several forward passes in both modes:
outputs, parameters, buffers, and all numbers that its modules count.
"""

import collections
import copy
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import exitkit
from exitkit.errors import UserError
from exitkit.networks.attach.exits import attach_exits
from exitkit.networks.cascade import Head
from exitkit.networks.copying import copied

SHAPE = (3, 12, 12)


def conv(inputs=8, outputs=8):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Net(nn.Module):
    """Three convolutions; what stands between them is the case."""

    def __init__(self, block=None, other=None):
        super().__init__()
        self.stem, self.mid, self.late, self.fc = conv(3), conv(), conv(), nn.Linear(8, 5)
        self.block = nn.ReLU() if block is None else block
        self.other = nn.ReLU() if other is None else other

    def forward(self, x):
        x = self.block(self.stem(x))
        x = self.other(self.mid(x))
        return self.fc(self.late(x).mean((2, 3)))


def same_in_many_passes(make, at=("mid",)):
    """Attach exits, and compare; return the cascade."""
    torch.manual_seed(0)
    model = make()
    reference = copied(model)
    network = attach_exits(model, at=list(at), input_shape=SHAPE)
    dtype = next(model.parameters()).dtype
    for step, mode in enumerate(["present", "training", "evaluation", "training", "training", "evaluation"]):
        outputs = []
        for runner in (reference, network):
            if mode != "present":
                runner.train(mode == "training")
            torch.manual_seed(step), random.seed(step), np.random.seed(step)
            outputs.append(runner(torch.rand(3, *SHAPE).to(dtype)))
        assert torch.equal(outputs[0], outputs[1].logits[-1]), (step, mode)
    held, expected = dict(model.named_buffers()), dict(reference.named_buffers())
    assert held.keys() == expected.keys() and all(torch.equal(held[name], expected[name]) for name in held)
    for name, module in reference.named_modules():
        numbers = {key: value for key, value in vars(module).items() if type(value) in (int, float) and key[0] != "_"}
        assert numbers == {key: vars(model.get_submodule(name))[key] for key in numbers}
    assert [row.exit for row in exitkit.cost(network)] == list(range(1, len(at) + 2))
    return network


# --- what a trace would freeze, lose or do once, in a submodule


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class CountsInBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class ReplacesBuffer(CountsInBuffer):
    def forward(self, x):
        self.calls = self.calls + 1
        return x * self.calls


class Averages(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 1, 1))

    def forward(self, x):
        if self.training:
            self.mean.data.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3))[:, None, None])
        return x - self.mean


class CountsInTensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(8, 1, 1)

    def forward(self, x):
        self.scale.mul_(1.5)
        return x * self.scale


class CountsInContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.log, self.recent = {"batches": []}, collections.deque(maxlen=3)

    def forward(self, x):
        self.log["batches"].append(x.shape[0])
        self.recent.append(1)
        return x * len(self.log["batches"]) / len(self.recent)


class CountsInObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.schedule = Schedule()

    def forward(self, x):
        self.schedule.step += 1
        return x * self.schedule.step


class Schedule:
    def __init__(self):
        self.step = 0


class KeepsFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = None

    def forward(self, x):
        self.kept = x.detach()
        return x


class CachesMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        size = tuple(x.shape[-2:])
        if size not in self.cache:
            self.cache[size] = torch.ones(size).tril()
        return x * self.cache[size]


class PythonRandom(nn.Module):
    def forward(self, x):
        return x * (1 + random.random())


class NumpyRandom(nn.Module):
    def forward(self, x):
        return x * (1 + float(np.random.rand()))


class OwnRandom(nn.Module):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def forward(self, x):
        return x * (1 + float(self.rng.random()))


class OwnTorchRandom(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + torch.rand(1, generator=self.generator)


class SkipsAtRandom(nn.Module):
    def forward(self, x):
        if self.training and torch.rand(1).item() < 0.5:
            return x
        return x.relu()


class StochasticDepth(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn(8, 1, 1)


class NoiseInTraining(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Branches(nn.Module):
    def forward(self, x):
        return 2 * x if x.mean() > 0 else x


class CatchesErrors(nn.Module):
    def forward(self, x):
        try:
            return 2 * x if x.mean() > 0 else x
        except Exception:
            return x


class WithoutGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    @torch.no_grad()
    def forward(self, x):
        return self.conv(x)


class InHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.conv(x).float()


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Reverses(nn.Module):
    def forward(self, x):
        return Reversal.apply(x)


class OwnBatchNorm(nn.BatchNorm2d):
    pass


class BatchNormByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.mean, self.var = 0.9 * self.mean + 0.1 * mean.detach(), 0.9 * self.var + 0.1 * var.detach()
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * self.scale[:, None, None]


class ClampsWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        self.conv.weight.data.clamp_(-0.05, 0.05)
        return self.conv(x)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens)
        return tokens.transpose(1, 2).reshape(batch, channels, height, width)


class Drops(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


def hooked(kind):
    block = nn.Sequential(conv(), nn.ReLU())
    if kind == "forward":
        block.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif kind == "input":
        block.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    else:
        block.register_full_backward_hook(lambda module, inputs, outputs: None)
    return Net(block)


def keeps_by_hook():
    network, kept = Net(nn.Sequential(conv(), nn.ReLU())), []
    network.block.register_forward_hook(lambda module, inputs, output: kept.append(output.detach()))
    network.kept = kept
    return network


def run_once(network):
    network(torch.rand(2, *SHAPE))
    return network


def frozen():
    network = Net(nn.Sequential(conv(), nn.BatchNorm2d(8)))
    network.stem.requires_grad_(False)
    network.block[1].eval()
    return network


def in_two_modes():
    network = Net(Drops(), Drops())
    network.block.eval()
    return network


def compiled_inside():
    network = Net()
    network.block = torch.compile(conv())
    return network


def used_twice(module):
    network = Net(module)
    network.other = network.block
    return network


OWN = [
    *(Counts, CountsInBuffer, ReplacesBuffer, Averages, CountsInTensor, CountsInContainers, CountsInObject),
    *(KeepsFeatures, CachesMask, PythonRandom, NumpyRandom, OwnRandom, OwnTorchRandom, SkipsAtRandom, StochasticDepth),
    *(Noise, NoiseInTraining, Branches, CatchesErrors, WithoutGradient, InHalf, Reverses, BatchNormByHand),
    *(ClampsWeights, Attends, Drops),
]
WORKS = {kind.__name__: lambda kind=kind: Net(kind()) for kind in OWN} | {
    "own batch norm": lambda: Net(OwnBatchNorm(8)),
    "batch norm without momentum": lambda: Net(nn.BatchNorm2d(8, momentum=None)),
    "instance norm with statistics": lambda: Net(nn.InstanceNorm2d(8, track_running_stats=True)),
    "random slopes": lambda: Net(nn.RReLU()),
    "alpha dropout": lambda: Net(nn.AlphaDropout()),
    "forward hook": lambda: hooked("forward"),
    "input hook": lambda: hooked("input"),
    "backward hook": lambda: hooked("backward"),
    "hook that keeps outputs": keeps_by_hook,
    "scripted part": lambda: Net(torch.jit.script(conv())),
    "traced part": lambda: Net(torch.jit.trace(conv(), torch.zeros(1, 8, 12, 12))),
    "compiled part": compiled_inside,
    "data-parallel part": lambda: Net(nn.DataParallel(conv())),
    "old spectral norm": lambda: run_once(Net(nn.utils.spectral_norm(conv()))),
    "old spectral norm, new": lambda: Net(nn.utils.spectral_norm(conv())),
    "spectral norm": lambda: run_once(Net(parametrizations.spectral_norm(conv()))),
    "spectral norm twice": lambda: used_twice(parametrizations.spectral_norm(conv())),
    "weight norm": lambda: Net(parametrizations.weight_norm(conv())),
    "orthogonal": lambda: Net(parametrizations.orthogonal(conv())),
    "lazy, after a pass": lambda: run_once(Net(nn.LazyConv2d(8, 3, padding=1))),
    "half precision": lambda: Net(nn.BatchNorm2d(8)).half(),
    "bfloat16": lambda: Net().bfloat16(),
    "double": lambda: Net(nn.BatchNorm2d(8)).double(),
    "frozen": frozen,
    "one block in evaluation": in_two_modes,
    "batch norm twice": lambda: used_twice(nn.BatchNorm2d(8)),
    "counter twice": lambda: used_twice(Counts()),
    "traced by torch.fx": lambda: torch.fx.symbolic_trace(Net(nn.BatchNorm2d(8))),
}


def test_a_part_that_torch_compile_has_wrapped_is_counted_without_a_warning_of_pytorch():
    with warnings.catch_warnings(action="error", category=UserWarning):
        network = exitkit.attach_exits(compiled_inside(), at=["block"], input_shape=SHAPE)
        costs = exitkit.cost(network)
    plain = compiled_inside()
    plain.block = plain.block._orig_mod
    assert costs == exitkit.cost(exitkit.attach_exits(plain, at=["block"], input_shape=SHAPE))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKS)
def test_what_a_submodule_does_besides_computing_is_done_in_every_pass(name):
    same_in_many_passes(WORKS[name])
    same_in_many_passes(WORKS[name], ("stem", "block", "mid"))


# --- the network's own forward: what works


class OwnForward(Net):
    def __init__(self):
        super().__init__(nn.BatchNorm2d(8))
        self.register_buffer("offset", torch.randn(8, 1, 1))
        self.scale = torch.tensor(1.5)

    def features(self, x):
        return self.fc(self.late(self.mid(self.block(x))).mean((2, 3)))


class MakesTensors(OwnForward):
    def forward(self, x):
        noise = torch.rand(1) * torch.arange(8.0)[:, None, None]
        return self.features(self.stem(x + torch.zeros(x.shape[0], 3, 1, 1)) + noise + self.offset.abs() * self.scale)


class WritesIntoImages(OwnForward):
    def forward(self, x):
        x[:, 0] = 0
        x.sub_(0.5)
        x /= 0.25
        return self.features(self.stem(x))


class WritesThroughNames(OwnForward):
    def forward(self, x):
        x = self.stem(x)
        other, number = x, x.shape[0]
        other += 1
        count = number
        count += 1
        F.relu_(x)
        x[:, :2].zero_()
        return self.features(x * other) * number / count


class Asserts(OwnForward):
    def forward(self, x):
        assert x.dim() == 4
        assert x.shape[1] == 3 and x.shape[2] == x.shape[3], "square images"
        assert isinstance(x, torch.Tensor) and len(x) >= 1
        return self.features(self.stem(x))


class ReadsSizesEarly(OwnForward):
    def forward(self, x):
        batch, _, height, width = x.shape
        device, kind = x.device, x.dtype
        x = self.late(self.mid(self.block(self.stem(F.avg_pool2d(x, 2)))))
        x = F.interpolate(x, size=(height, width)) + torch.ones(height, width, device=device, dtype=kind)
        return self.fc(x.mean((2, 3)).view(batch, -1))


class ChangesWithMode(OwnForward):
    def forward(self, x):
        x = F.dropout(self.stem(x), 0.3 if self.training else 0.0)
        return self.features(x * (2.0 if self.training else 1.0))


class ReturnsMoreInTraining(OwnForward):
    def forward(self, x):
        x = self.stem(x)
        logits = self.features(x)
        return logits if not self.training else (logits, x)


class Shares(OwnForward):
    def forward(self, x):
        x = self.mid(self.block(self.mid(self.block(self.stem(x)))).relu())
        return self.fc(F.conv2d(x, self.mid.weight, padding=1).mean((2, 3)))


class ChecksType(OwnForward):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = self.stem(x)
        return self.features(x)


class Masks(OwnForward):
    def forward(self, x):
        mask = torch.ones(12, 12).tril()
        x = self.mid(self.stem(x) * mask) * mask
        return self.fc(self.late(x * mask).mean((2, 3)))


OWN_WORKS = [MakesTensors, WritesIntoImages, WritesThroughNames, Asserts, ReadsSizesEarly, ChangesWithMode, Shares]


@pytest.mark.parametrize("kind", [*OWN_WORKS, ChecksType, Masks])
def test_what_the_networks_own_forward_does_is_repeated(kind):
    same_in_many_passes(kind)
    network = same_in_many_passes(kind, ("stem", "mid")).eval()
    if kind is not MakesTensors:  # each pass draws other numbers
        x = torch.rand(4, *SHAPE)
        whole = network(x.clone()).logits[-1]
        assert torch.equal(pickle.loads(pickle.dumps(network))(x.clone()).logits[-1], whole)
        rule = exitkit.ExitRule("confidence", (float("inf"), float("inf"), -float("inf")))
        assert torch.equal(exitkit.AdaptiveInference(network, rule)(x).logits, whole.detach())
        for number in (1, 2, 3):
            cut = exitkit.prune_to(network, number).eval()
            assert torch.equal(cut(x.clone()).logits[0], network(x.clone()).logits[number - 1])


def test_more_results_in_training_are_no_other_network():
    network = attach_exits(ReturnsMoreInTraining(), at=["mid"], input_shape=SHAPE)
    assert network.train()(torch.rand(2, *SHAPE)).logits[-1].shape == (2, 5)


def test_sizes_that_cross_are_those_of_the_images_at_hand():
    """Another size than that of attaching, and fewer images than before the exit."""
    model = ReadsSizesEarly().eval()
    network = attach_exits(model, at=["stem", "mid"], input_shape=SHAPE).eval()
    x = torch.rand(5, 3, 20, 16)
    state = network.stages[0](x)
    state = torch.utils._pytree.tree_map(lambda tensor: tensor[[0, 3]], state)
    for stage in network.stages[1:]:
        state = stage(state)
    assert torch.equal(network.heads[-1](network.view(state)), model(x[[0, 3]]))


def test_an_assertion_still_asserts():
    network = attach_exits(Asserts(), at=["mid"], input_shape=SHAPE)
    with pytest.raises(AssertionError, match=r"the assertion at .*test_attach_anything.py:\d+ does not hold"):
        network(torch.rand(2, 3, 12, 10))


def test_gradients_of_a_function_of_ones_own_are_its_own():
    torch.manual_seed(0)
    model = Net(Reverses())
    reference = copy.deepcopy(model)
    network, x = attach_exits(model, at=["mid"], input_shape=SHAPE), torch.rand(2, *SHAPE)
    reference(x).sum().backward()
    network(x).logits[-1].sum().backward()
    assert torch.equal(model.stem.weight.grad, reference.stem.weight.grad)


def test_neither_the_network_nor_a_random_state_changes():
    network, kept = keeps_by_hook(), []
    network.block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    network.other = Counts()
    before = copy.deepcopy(network.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist()
    attach_exits(network, at=["mid"], input_shape=SHAPE)
    assert not kept and not network.kept and network.other.calls == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_modules_are_named_by_their_paths():
    """torchvision's printed names count repeated names, so that `conv_2` would be the third."""

    class Numbered(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_1, self.conv_2, self.conv_3, self.fc = conv(3), conv(), conv(), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.conv_3(self.conv_2(self.conv_1(x))).mean((2, 3)))

    network = attach_exits(Numbered(), at=["conv_2"], input_shape=SHAPE)
    assert [name for name, _ in network.stages[0].named_children()] == ["conv_1", "conv_2"]


def test_weights_of_earlier_releases_with_constants_in_place_of_buffers_are_read():
    network = attach_exits(MakesTensors(), at=["mid"], input_shape=SHAPE)
    old = network.state_dict() | {"stages.1._tensor_constant3": torch.zeros(2, dtype=torch.long)}
    network.load_state_dict(old)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network.load_state_dict(network.state_dict() | {"stages.1.other": torch.zeros(1)})


# --- refusals


class SetsAttribute(OwnForward):
    def forward(self, x):
        self.kept = self.stem(x)  # here
        return self.features(self.kept)


class CountsItself(OwnForward):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1  # here
        return self.features(self.stem(x)) * self.calls


class CountsItselfInBuffer(CountsItself):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen.add_(1)  # here
        return self.features(self.stem(x))


class ReadsACounter(Net):
    def __init__(self):
        super().__init__(Counts())

    def forward(self, x):
        logits = super().forward(x)
        return logits * self.block.calls  # here


class BranchesItself(OwnForward):
    def forward(self, x):
        if x.mean() > 0:  # here
            x = 2 * x
        return self.features(self.stem(x))


class AssertsEither(OwnForward):
    def forward(self, x):
        assert x.dim() == 4 or x.dim() == 3  # here
        return self.features(self.stem(x))


class Loops(OwnForward):
    def forward(self, x):
        for _ in range(x.shape[1]):  # here
            x = x + 1
        return self.features(self.stem(x))


class Iterates(OwnForward):
    def forward(self, x):
        x = torch.stack([2 * image for image in x])  # here
        return self.features(self.stem(x))


class TurnsGradientsOff(OwnForward):
    def forward(self, x):
        with torch.no_grad():  # here
            x = self.stem(x)
        return self.features(x)


class EntersAutocast(OwnForward):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # here
            x = self.stem(x)
        return self.features(x.float())


class ScalesInTrainingInPlace(OwnForward):
    def forward(self, x):
        x = self.stem(x)
        if self.training:
            x.mul_(2)  # here
        return self.features(x)


class ReturnsProbabilities(OwnForward):
    def forward(self, x):
        logits = self.features(self.stem(x))
        return logits if self.training else logits.softmax(1)  # here


class ReturnsNoise(OwnForward):
    def forward(self, x):
        logits = self.features(self.stem(x))
        return logits + torch.rand_like(logits) if self.training else logits  # here


class HoldsAList(OwnForward):
    def __init__(self):
        super().__init__()
        self.layers = [conv()]

    def forward(self, x):
        return self.features(self.layers[0](self.stem(x)))  # here


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (SetsAttribute, "its forward sets its attribute kept at WHERE.*; move this into a submodule"),
        (CountsItself, "its forward uses calls, which changes with every forward pass at WHERE"),
        (CountsItselfInBuffer, "its forward uses seen, which changes with every forward pass at WHERE"),
        (ReadsACounter, "its forward uses block.calls, which changes with every forward pass at WHERE"),
        (BranchesItself, "its forward has control flow that depends on a tensor or its size at WHERE"),
        (AssertsEither, "asserts something of a tensor or its size at WHERE.*; remove the assert, or write torch._ass"),
        (Loops, "converts a tensor or a size to a number of Python at WHERE"),
        (Iterates, "loops over a tensor or a size, or unpacks one at WHERE"),
        (TurnsGradientsOff, r"turns gradients on or off at WHERE.*; freeze parameters by requires_grad_\(False\)"),
        (EntersAutocast, "enters torch.autocast at WHERE"),
        (ScalesInTrainingInPlace, "computes mul_ in training only at WHERE; expected one forward for both modes"),
        (ReturnsProbabilities, "computes softmax in evaluation only at WHERE"),
        (ReturnsNoise, "computes add in training only at WHERE"),
        (
            HoldsAList,
            "calls a Conv2d that is no submodule of the network at WHERE.*; hold it as an attribute or in nn.Mo",
        ),
    ],
)
def test_a_refusal_names_the_line_and_the_remedy(kind, complaint):
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith(f"class {kind.__name__}("))
    line = next(index for index in range(first, len(lines)) if lines[index].endswith("# here")) + 1
    with pytest.raises(UserError, match=complaint.replace("WHERE", rf"\S*test_attach_anything.py:{line}")) as caught:
        attach_exits(kind(), at=["mid"], input_shape=SHAPE)
    assert kind.__name__ in str(caught.value) and "\n" not in str(caught.value)


CALLS = [0]


class CountsGlobally(nn.Module):
    def forward(self, x):
        CALLS[0] += 1
        return x * CALLS[0]


def with_hook():
    network = Net()
    network.register_forward_hook(lambda module, inputs, output: 2 * output)
    return network


def compiled_in_place():
    network = Net()
    network.compile()
    return network


def replaced_forward():
    network = Net()
    network.forward = lambda x: network.fc(x.flatten(1)[:, :8])
    return network


class MakesLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = None

    def forward(self, x):
        if self.conv is None:
            self.conv = nn.Conv2d(x.shape[1], x.shape[1], 1)
        return self.conv(x)


class ReturnsDict(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


class ReturnsPair(Net):
    def forward(self, x):
        return super().forward(x), x


class OneLogit(Net):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 1)


class Fails(nn.Module):
    def forward(self, x):
        raise ValueError("no")


class Lock:
    def __deepcopy__(self, memo):
        raise TypeError("a lock has no copy")


def with_lock():
    network = Net()
    network.lock = Lock()
    return network


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: nn.DataParallel(Net()), "DataParallel is a wrapper.*; pass the network inside it: model.module"),
        (lambda: torch.compile(Net()), "OptimizedModule is a wrapper of torch.compile; .*: model._orig_mod"),
        (compiled_in_place, "Net is compiled, which its stages would not run; .*before torch.compile"),
        (lambda: torch.jit.script(Net()), "is scripted; expected the module that was given to torch.jit.script"),
        (with_hook, r"Net has the forward hook <lambda> at \S+:\d+, which its stages would not run; remove it"),
        (replaced_forward, "the forward of this Net was replaced; expected a class that defines its forward"),
        (lambda: Net(nn.LazyConv2d(8, 3, padding=1)), r"block \(LazyConv2d\) has no values yet; run the model once"),
        (lambda: Net(MakesLayers()), "Net makes block.conv.weight in its first forward pass; run the model once"),
        (ReturnsDict, "ReturnsDict returns a dict with the keys logits; expected one tensor of logits.*: wrap it"),
        (ReturnsPair, "ReturnsPair returns a tuple; expected one tensor of logits.*: wrap it"),
        (OneLogit, "OneLogit returns one logit per image; expected at least 2, one per class"),
        (lambda: Net(Fails()), r"Net does not accept images of 3x12x12 \(no\); the error is raised at \S+:\d+"),
        (lambda: Net(CountsGlobally()), r"computes other logits than the network in \w+ mode.*does something that"),
        (with_lock, r"Net can't be copied \(a lock has no copy\)"),
    ],
)
def test_networks_that_no_cascade_can_repeat_are_refused_in_one_line(make, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        attach_exits(make(), at=["mid"], input_shape=SHAPE)
    assert "\n" not in str(caught.value)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv(3), conv()

    def forward(self, x):
        x = self.first(x)
        if x.mean() > 0:
            x = 2 * x
        return self.second(x)


class WithBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.late, self.fc = Body(), conv(), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.late(self.body(x)).mean((2, 3)))


def test_points_inside_a_module_that_is_called_as_a_whole_are_refused_with_the_reason():
    reason = r"body is called as a whole, since it has control flow that depends on a tensor or its size at \S+:\d+"
    with pytest.raises(
        UserError, match=f"WithBody can't be cut at body.first: {reason} .*nearest possible points are bo"
    ):
        attach_exits(WithBody(), at=["body.first"], input_shape=SHAPE)
    with pytest.raises(UserError, match=f"expected at most 2 shares, one per possible place .{reason}"):
        attach_exits(WithBody(), fractions=[0.1, 0.2, 0.3], input_shape=SHAPE)
    with pytest.raises(UserError, match=r"block.attention is called as a whole, since it is one module of torch.nn"):
        attach_exits(Net(Attends()), at=["block.attention.out_proj"], input_shape=SHAPE)


def head_with(first=None, outputs=5, inputs=8):
    first = [] if first is None else [first]
    return lambda shape, classes: Head(
        nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(inputs, outputs)
    )


@pytest.mark.parametrize(
    ("head", "complaint"),
    [
        (head_with(nn.ReLU(inplace=True)), "the head at mid changes features in place.*inplace=False"),
        (head_with(outputs=4), r"the head at mid returns logits of shape \[2, 4\]; expected \[2, 5\]"),
        (head_with(inputs=9), r"the head at mid does not accept features of shape \[2, 8, 12, 12\]"),
        (lambda shape, classes: nn.Linear(8, 5), "the head at mid is a Linear; expected an exitkit.networks.Head"),
    ],
)
def test_heads_that_do_not_fit_are_refused(head, complaint):
    with pytest.raises(UserError, match=complaint):
        attach_exits(Net(), at=["mid"], input_shape=SHAPE, head=head)


@pytest.mark.parametrize("shape", [(3, 12), (3, 0, 12), (3.0, 12, 12)])
def test_image_shapes_are_checked(shape):
    with pytest.raises(UserError, match=r"input_shape is .*; expected .channels, height, width."):
        attach_exits(Net(), at=["mid"], input_shape=shape)


def test_hooks_of_a_copy_keep_the_defaults_of_their_keywords():
    seen, layer = [], nn.Linear(2, 2)

    def hook(module, given, result, *, scale=2):
        seen.append(scale)

    layer.register_forward_hook(hook)
    copied(layer)(torch.ones(1, 2))
    layer(torch.ones(1, 2))
    assert seen == [2]  # the copy fills a list of its own
