"""One rank of tests/test_distributed.py: every method trains in float64 on its share of every batch.

python ranks.py OUT, alone or under torchrun; saves {(method, mode): what came out} as OUT/RANK.pt.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import exitkit
from exitkit.engine import Engine
from exitkit.plugins import registered
from exitkit.run import Run

from toy import batches, chain, sgd

torch.set_num_threads(1)
world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
if world > 1:
    dist.init_process_group("gloo")


class Shares:
    """This rank's share of every batch; the last batch does not divide evenly."""

    def __init__(self, engine):
        self.engine = engine

    def __iter__(self):
        whole = [*batches(3, size=8), *batches(1, size=5, seed=9)]
        for images, labels in whole:
            mine = torch.arange(len(labels)).tensor_split(world)[rank]
            self.engine.share = len(mine) * world / len(labels)
            yield images[mine], labels[mine]


def trained(method, mode):
    network = chain(3, batchnorm=True)
    strategy = exitkit.build_strategy(method)
    strategy.adapt(network)
    engine = Engine(torch.device("cpu"), rank=rank, world=world)
    engine.place(network)
    if mode == "eval":
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
    run = Run(network, strategy, sgd(network), engine)
    run.position.epochs = 2
    strategy.prepare(run)
    for epoch in range(2):
        run.position.epoch = epoch
        strategy.train_epoch(run, Shares(engine))
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, side in run.auxiliaries.items():
        state |= {f"{name}.{key}": tensor for key, tensor in side.module.state_dict().items()}
    return state


results = {(method, mode): trained(method, mode) for method in registered("method") for mode in ("train", "eval")}
engine = Engine(torch.device("cpu"), rank=rank, world=world)
ragged = [torch.arange(length, dtype=torch.float64)[:, None] + 10 * length for length in (1, 2)]
results["gathered"] = {"": engine.gather(ragged[rank]) if world > 1 else torch.cat(ragged)}
torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
