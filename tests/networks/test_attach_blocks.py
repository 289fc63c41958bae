"""Networks cut between the blocks of a list, with code around the blocks that torch.fx can't trace."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import exitkit
from exitkit.errors import UserError
from exitkit.networks.attach.blocks import find_blocks

SHAPE = (3, 8, 8)


def images(count=4):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Control flow on values: never traceable."""

    def __init__(self, width):
        super().__init__()
        self.mix, self.drop = nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x, places=None):
        if not torch.isfinite(x).all():
            raise ValueError("not finite")
        y = self.drop(self.mix(x)) if places is None else self.drop(self.mix(x + places))
        return x + y, y


class Result(dict):
    """What a network of transformers returns: an object with logits, which may hold more."""

    @property
    def logits(self):
        return self["logits"]


class Classifier(nn.Module):
    """Asks for a type, counts images, draws noise in training, and passes a table and tuples between the blocks."""

    def __init__(self, width=12, depth=5, noise=0.1):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.noise = noise
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Block(width) for _ in range(depth))
        self.encoder.forward = None
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, pixels, labels=None):
        if pixels.dtype != self.token.dtype:
            pixels = pixels.to(self.token.dtype)
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        tokens = len(pixels) * [None]
        x = torch.cat([self.token.expand(len(tokens), -1, -1), x], 1)
        x = F.dropout(x, self.noise, self.training)
        places = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None].sin()
        for number, block in enumerate(self.encoder.layer):
            x, extra = block(x, places if number % 2 else None)
            x += 0.1 * extra
        x = self.norm(x)[:, 0].reshape(2 * x.shape[0], -1).reshape(x.shape[0], -1)
        return Result(logits=self.head(x), labels=labels)


def attach(model, **where):
    return exitkit.attach_exits(model, blocks="encoder.layer", input_shape=SHAPE, **where)


@pytest.mark.parametrize("where", [{"at": [0, 2]}, {"fractions": [0.3, 0.7]}])
def test_the_last_exit_is_the_network_in_both_modes(where):
    model = Classifier()
    network = attach(model, **where)
    x = images()
    for twin in (network, pickle.loads(pickle.dumps(copy.deepcopy(network)))):
        for training in (False, True):
            model.train(training), twin.train(training)
            torch.manual_seed(3)
            expected = model(x).logits
            torch.manual_seed(3)
            assert torch.equal(twin(x).logits[-1], expected)
    assert {id(p) for p in model.parameters()} <= {id(p) for p in network.parameters()}
    rows = [row.macs for row in exitkit.cost(network)]
    assert len(rows) == 3 and rows == sorted(set(rows))


def test_rows_leave_and_gradients_are_those_of_the_network():
    model = Classifier().eval()
    network = attach(model, at=[1, 3]).eval()
    x = images()
    whole = network(x).logits
    state = x
    for index in range(3):
        output, state, _ = network.step(index, state)
        torch.testing.assert_close(output.logits, whole[index][index:])
        state = tuple(part[1:] for part in state) if isinstance(state, tuple) else state[1:]
    got = torch.autograd.grad(network(x).logits[-1].sum(), [*model.parameters()])
    want = torch.autograd.grad(model(x).logits.sum(), [*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("method", ["joint", "ge", "boostnet"])
def test_methods_train_it(method):
    network = attach(Classifier(), at=[1, 3], head="norm")
    run = exitkit.Run.local(network, exitkit.build_strategy(method), torch.optim.SGD(network.parameters(), lr=0.1))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    run.train_step((images(), torch.tensor([0, 1, 2, 4])))
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(before[name], parameter)}
    assert {name for name in before if name.startswith("stages")} <= moved
    assert all(any(name.startswith(f"heads.{index}.") for name in moved) for index in range(3))


class Stages(nn.Module):
    """Lists inside a list, as in convolutional networks of transformers."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList()
        for width in (4, 6):
            stage = nn.Module()
            stage.layers = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(3)))
            stage.down = nn.Conv2d(3 if width == 4 else 4, width, 2, 2)
            self.stages.append(stage)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        if x.dtype == torch.float16:
            x = x.float()
        for stage in self.stages:
            x = stage.layers(stage.down(x))
        return self.fc(x.mean((2, 3)))


def test_blocks_of_every_stage_by_a_pattern():
    model = Stages().eval()
    assert find_blocks(model) == "stages.*.layers"
    network = exitkit.attach_exits(model, blocks="stages.*.layers", at=[0, 2, 4], input_shape=SHAPE).eval()
    assert torch.equal(network(images()).logits[-1], model(images()))
    assert "stages.0.layers.0.weight" in network.stages[0].state_dict()
    assert "stages.0.layers.1.weight" in network.stages[1].state_dict()
    maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    assert find_blocks(maps) is None
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])])
    assert find_blocks(nn.ModuleDict({"a": nested})) == "a.*"


def test_the_error_of_the_traced_route_has_the_line_to_type():
    model = Classifier()
    with pytest.raises(UserError, match=r"or cut it between its blocks: exitkit\.attach") as refused:
        exitkit.attach_exits(model, fractions=[0.5], input_shape=SHAPE)
    line = str(refused.value).rpartition("blocks: ")[2]
    assert eval(line, {"exitkit": exitkit, "model": model}).num_exits == 2


class ReadsValues(Classifier):
    def forward(self, pixels, labels=None):
        return super().forward(pixels if pixels.mean() > 9 else pixels + 1)


class OtherInTraining(Classifier):
    def forward(self, pixels, labels=None):
        return super().forward(pixels * 2 if self.training else pixels)


class NoLogits(Classifier):
    def forward(self, pixels, labels=None):
        return [super().forward(pixels)]


class RunsHalf(Classifier):
    def forward(self, pixels, labels=None):
        x = self.patches(pixels).flatten(2).mean(2)
        return self.head(self.encoder.layer[0](x)[0])


@pytest.mark.parametrize(
    ("kind", "blocks", "at", "complaint"),
    [
        (Classifier, "encoder.layers", [0], "has no list of at least two blocks at 'encoder.layers'; .* encoder.layer"),
        (Classifier, "encoder.layer", [4], "expected ascending numbers of blocks, from 0 to 3"),
        (Classifier, "encoder.layer", ["encoder.layer.1"], "expected ascending numbers of blocks"),
        (Classifier, "encoder.layer", [2, 1], "expected ascending numbers of blocks"),
        (
            ReadsValues,
            "encoder.layer",
            [0],
            "reads the values of a tensor that depends on the images .at .*test_attach",
        ),
        (OtherInTraining, "encoder.layer", [0], "in some runs only; expected one forward"),
        (NoLogits, "encoder.layer", [0], "returns a list; expected one tensor of logits"),
        (RunsHalf, "encoder.layer", [0], "encoder.layer.1 of RunsHalf does not run"),
    ],
)
def test_networks_that_are_not_cut_between_blocks_are_refused(kind, blocks, at, complaint):
    with pytest.raises(UserError, match=complaint):
        exitkit.attach_exits(kind(), blocks=blocks, at=at, input_shape=SHAPE)


def test_images_of_another_size_are_refused():
    network = attach(Classifier(), at=[0])
    with pytest.raises(UserError, match="the images are 3x16x16; this network was cut for images of 3x8x8"):
        network(torch.randn(2, 3, 16, 16))
