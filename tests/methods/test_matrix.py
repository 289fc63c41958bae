"""Every method on every family of networks: losses, what moves and what stays, state, resuming, ranks, bf16.

CI runs a slice; `pytest -m full tests/methods/test_matrix.py` runs all of it and prints what docs/matrix.md shows.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import exitkit
from exitkit.engine import Engine, Ranks
from exitkit.engine.randomness import derive
from exitkit.errors import UserError
from exitkit.plugins import registered
from exitkit.strategy import LocalBatch, Run
from exitkit.training.phase import BegunPhase

HERE = Path(__file__).parent
NETWORKS = {
    "msdnet": ("msdnet-tiny", (1, 16, 16)),
    "ranet": ("ranet-tiny", (1, 16, 16)),
    "sdn": ("sdn-tiny", (1, 16, 16)),
    "torchvision": ("torchvision:resnet18", (3, 32, 32)),
}
COMPOSED = ["ge+ofa", "boostnet+l2w", "metagf+kd", "pcgrad+ofa", "imta+l2w"]
METHODS = [*registered("method"), *COMPOSED]
SLICE = {(method, "msdnet") for method in METHODS} | {
    (method, family) for method in ("joint", "boostnet", "metagf", "l2w") for family in NETWORKS
}
CASES = [
    pytest.param(method, family, marks=() if (method, family) in SLICE else pytest.mark.full)
    for method in METHODS
    for family in NETWORKS
]


class Batches:
    """Three batches, the last one ragged; this rank's share of each."""

    sizes = (8, 8, 5)

    def __init__(self, run, shape, engine, epoch):
        self.run, self.shape, self.engine, self.epoch = run, shape, engine, epoch

    def __iter__(self):
        at = self.run.position
        at.steps = 3
        for step, size in enumerate(self.sizes):
            generator = torch.Generator().manual_seed(derive(self.epoch, step))
            images = torch.randn(size, *self.shape, generator=generator)
            labels = torch.randint(10, (size,), generator=generator)
            ranks = self.engine.ranks
            shares = torch.arange(size).tensor_split(ranks.world)
            mine, start = shares[ranks.rank], sum(map(len, shares[: ranks.rank]))
            at.step = step
            reference = next(self.run.network.parameters())
            torch.manual_seed(derive("noise", at.phase, at.epoch, step, ranks.rank))
            local = images[mine].to(reference.dtype), labels[mine]
            self.run.batch = LocalBatch.make(*local, start, size, ranks.world)
            yield self.run.batch
        at.passes += 1


def build(family, dtype=torch.float32):
    name, shape = NETWORKS[family]
    torch.manual_seed(0)
    network = exitkit.build_network(name, num_classes=10, input_shape=shape).to(dtype)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout) and dtype == torch.float64:
            module.p = 0.0  # each rank draws its own
    return network, shape


def begin(network, phase, number, engine):
    """Set a phase up as training does."""
    torch.manual_seed(number)
    before = {name for name, _ in network.named_parameters()}
    modules = {name for name, _ in network.named_modules()}
    phase.strategy.adapt(network)
    added = {name for name, _ in network.named_modules()} - modules
    engine.place(network)
    for name, parameter in network.named_parameters():
        whole = {"all": True, "new": name not in before}
        parameter.requires_grad_(whole[phase.train] if isinstance(phase.train, str) else name.startswith(phase.train))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    run = Run(network, phase.strategy, torch.optim.SGD(trained, 0.001, 0.9, weight_decay=1e-4), engine)
    run.position.phase, run.position.epochs = number, 2
    torch.manual_seed(number)
    phase.strategy.prepare(run)
    BegunPhase(phase, run, added).train_mode()
    return run, added


def epoch(run, shape, engine, number):
    run.position.epoch, run.position.passes, run.position.step = number, 0, 0
    run.strategy.train_epoch(run, Batches(run, shape, engine, number))
    losses = run.meter.averages()[0]
    assert len(losses) == run.network.num_exits and all(torch.tensor(losses).isfinite())


def trained(method, family, dtype=torch.float32, precision="fp32", engine=None):
    """Train two epochs of every phase; yield the run, its phase and the weights before, phase by phase."""
    network, shape = build(family, dtype)
    engine = engine or Engine(torch.device("cpu"), precision)
    for number, phase in enumerate(exitkit.build_strategy(method).phases(2, network.num_exits)):
        run, added = begin(network, phase, number, engine)
        before = copy.deepcopy(network.state_dict())
        epoch(run, shape, engine, 0)
        middle = copy.deepcopy(run.state_dict())
        epoch(run, shape, engine, 1)
        yield run, phase, before, middle, added


@pytest.mark.parametrize(("method", "family"), CASES)
def test_what_should_move_moves_and_a_run_goes_on_to_the_same_bits(method, family):
    for number, (run, phase, before, middle, _) in enumerate(trained(method, family)):
        weights = run.weights()
        counting = {index for index, weight in enumerate(weights) if weight}
        reached = readers(run.network)
        for name, parameter in run.network.named_parameters():
            moved = not torch.equal(parameter, before[name])
            if parameter.requires_grad and counting & set(reached[name]):
                # A bias before batch norm has no effect, and only weight decay moves what is not zero.
                assert moved or not before[name].any(), name
            else:
                assert not moved, name
        # The state of the first epoch, in a network and a run set up anew, leads to the same end.
        network, shape = build(family)
        engine = Engine(torch.device("cpu"))
        for earlier, each in enumerate(exitkit.build_strategy(method).phases(2, network.num_exits)[: number + 1]):
            again, added = begin(network, each, earlier, engine)
        again.load_state_dict(middle)
        BegunPhase(phase, again, added).train_mode()
        epoch(again, shape, engine, 1)
        for name, value in run.network.state_dict().items():
            assert torch.equal(value, network.state_dict()[name]), name


def readers(network):
    from exitkit.networks.ownership import owners

    found = owners(network)
    return {name: found.get(name, ()) for name, _ in network.named_parameters()}


@pytest.mark.parametrize(
    ("method", "family"),
    [pytest.param(*case.values, marks=[pytest.mark.full] * (case.values[1] != "msdnet")) for case in CASES],
)
def test_half_precision_trains(method, family):
    for run, *_ in trained(method, family, precision="bf16"):
        for tensor in run.network.state_dict().values():
            assert tensor.dtype != torch.bfloat16 and tensor.isfinite().all()


def on_this_rank(cases, out):
    """Train the cases on this rank's shares, in float64, and save what comes out (see the test below)."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    Batches.sizes = (16, 16, 10)  # batch statistics of two or three images blow rounding up
    if world > 1:
        torch.distributed.init_process_group("gloo")
    ends = {}
    for case in cases:
        *_, (run, *_) = trained(
            *case.split(":"), torch.float64, engine=Engine(torch.device("cpu"), "fp32", Ranks(rank, world))
        )
        ends[case] = dict(run.network.state_dict())
    torch.save(ends, f"{out}/{rank}.pt")


@pytest.mark.full
@pytest.mark.timeout(1800)  # all methods, three times, in one test
@pytest.mark.parametrize("family", NETWORKS)
def test_two_ranks_equal_one(family, tmp_path):
    cases = [f"{method}:{family}" for method in METHODS]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, folder in (([sys.executable], tmp_path / "alone"), (torchrun, tmp_path / "together")):
        folder.mkdir()
        command = [*launcher, "test_matrix.py", str(folder), *cases]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    alone = torch.load(tmp_path / "alone" / "0.pt")
    ranks = [torch.load(tmp_path / "together" / f"{rank}.pt") for rank in range(2)]
    for case, state in alone.items():
        # tests/engine/test_ranks.py holds all of them to 1e-9 on a chain. Here Nash-MTL's solver stops as soon as it is
        # near enough, Aligned-MTL divides by vanishing singular values, and Adam (L2W) by vanishing means.
        loose = {"nashmtl": 1e-3, "aligned": 1e-3, "l2w": 1e-3}
        near = max([loose.get(part, 1e-6) for part in case.split(":")[0].split("+")])
        for name, value in state.items():
            assert torch.allclose(ranks[0][case][name], value, rtol=near, atol=near), (case, name)
            assert torch.equal(ranks[0][case][name], ranks[1][case][name]), (case, name)


def test_a_combination_that_can_not_be_is_refused_before_anything_moves():
    for method in ("metagf+pcgrad", "boostnet+isc", "kd+ofa", "imta+separate", "l2w+metagf"):
        with pytest.raises(UserError, match="both claim the slot"):
            exitkit.build_strategy(method)


if __name__ == "__main__":
    on_this_rank(sys.argv[2:], sys.argv[1])
