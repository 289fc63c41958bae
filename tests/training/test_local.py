"""Runs in a loop of one's own."""

import torch

import exitkit

from toy import chain, sgd


def test_a_local_run_leaves_the_callers_random_state_as_it_is():
    network = chain()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for method in ("joint", "metagf", "l2w"):
        exitkit.Run.local(network, method, sgd(network))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_and_loading_leave_the_callers_process_as_it_was(tmp_path):
    from toy import FEW

    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run = exitkit.train({"method": "isc", "epochs": 1, "threads": threads + 1, **FEW}, tmp_path)
    exitkit.load_network(run)
    exitkit.evaluate(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
