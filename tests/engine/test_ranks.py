"""Two ranks with half of each batch make the updates of one rank with the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from exitkit.engine.batchnorm import SyncedBatchNorm, synchronise_batchnorm
from exitkit.errors import UserError

from toy import chain

HERE = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def call(*command, cwd=HERE):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_ranks_make_the_updates_of_one_for_every_method(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    call(sys.executable, "ranks.py", str(alone))
    call(*TORCHRUN, "ranks.py", str(together))
    expected = torch.load(alone / "0.pt")
    ranks = [torch.load(together / f"{rank}.pt") for rank in range(2)]
    methods = {key[0] for key in expected if key != "gathered"}
    assert methods >= {"joint", "ge", "boostnet", "metagf"}
    for case, state in expected.items():
        assert state.keys() == ranks[0][case].keys()
        # Nash-MTL's solver stops as soon as it is near enough.
        rtol, atol = (1e-4, 1e-4) if case[0] == "nashmtl" else (1e-9, 1e-11)
        for name, value in state.items():
            assert torch.allclose(ranks[0][case][name], value, rtol=rtol, atol=atol), (case, name)
            assert torch.equal(ranks[0][case][name], ranks[1][case][name]), (case, name)
    start = {
        f"network.stages.0.{name}": value for name, value in chain(3, batchnorm=True).stages[0].state_dict().items()
    }
    for case in (key for key in expected if key[1:2] == ("frozen",)):
        assert all(torch.equal(expected[case][name], value) for name, value in start.items()), case


def test_synchronised_batchnorm_in_one_process_is_batchnorm(tmp_path):
    # A process group of one: the arithmetic is the synchronised one, the batch is whole.
    script = f"""
import torch, torch.distributed as dist
from torch import nn
from toy import chain

from exitkit.engine.batchnorm import SyncedBatchNorm
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=0, world_size=1)
for affine in (True, False):
    torch.manual_seed(0)
    plain, synced = (kind(3, affine=affine).double() for kind in (torch.nn.BatchNorm2d, SyncedBatchNorm))
    x = torch.randn(4, 3, 5, 5).double().requires_grad_()
    weights = torch.randn(4, 3, 5, 5).double()
    for step in range(3):
        a, b = plain(x), synced(x)
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        ga, gb = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (a, b))
        assert torch.allclose(ga, gb, rtol=1e-9, atol=1e-11)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, synced.state_dict()[name], rtol=1e-12), name
    assert torch.autograd.gradcheck(synced, (x,))
"""
    call(sys.executable, "-c", script)


def test_synchronising_shares_parameters_and_keeps_names_and_modes():
    network = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()))
    before = network.state_dict()
    parameters = list(network.parameters())
    synchronise_batchnorm(network)
    assert all(isinstance(module, SyncedBatchNorm) for module in network[1])
    assert [id(p) for p in network.parameters()] == [id(p) for p in parameters]
    assert network.state_dict().keys() == before.keys()
    assert network[1][0].training and not network[1][1].training
    x = torch.randn(5, 2)
    assert network(x).shape == (5, 3)  # without a process group it is plain batch normalisation


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_synchronising_keeps_the_activation_of_a_norm_and_refuses_unknown_ones():
    network, x = nn.Sequential(nn.Conv2d(1, 3, 1), NormAct(3)), torch.randn(4, 1, 5, 5)
    expected = network(x)
    synchronise_batchnorm(network)
    assert isinstance(network[1], SyncedBatchNorm) and torch.equal(network(x), expected) and (expected == 0).any()
    with pytest.raises(UserError, match=r"^0 is a Doubled, whose statistics can't be those of all ranks"):
        synchronise_batchnorm(nn.Sequential(Doubled(3)))


def test_synchronising_keeps_hooks():
    network = nn.Sequential(nn.BatchNorm1d(3))
    network[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))
    network[0].register_forward_hook(lambda module, inputs, output: output + 1)
    synchronise_batchnorm(network)
    assert torch.equal(network(torch.randn(5, 3)), torch.ones(5, 3))


TRAINED = """
import sys, exitkit
from toy import FEW
run = exitkit.train({"method": "kd", "method_settings": {"teacher": "joint"}, "epochs": 1, **FEW}, sys.argv[1])
assert run.finished and len(run.results()["test"]) == 4
print("finished")
"""


def test_train_returns_a_finished_run_on_every_rank(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{TRAINED}")
    done = call(*TORCHRUN, str(script), str(tmp_path / "runs"))
    assert done.stdout.count("finished") == 2
    assert len(list((tmp_path / "runs").glob("*/results.json"))) == 2  # the teacher's and the pupil's
