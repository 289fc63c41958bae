"""Settings of the process for a device, which are restored, and seeds of its generators."""

import contextlib

import pytest
import torch

from exitkit.engine.devices import Placement, process_settings

CUDA = torch.device("cuda")


def settings():
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_on_a_gpu_are_deterministic_or_the_fastest(monkeypatch, deterministic):
    entered = []

    class Entered(contextlib.AbstractContextManager):
        """In the place of torch.cuda.device, on a machine without a GPU."""

        def __init__(self, device):
            entered.append(device)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "set_device", None)  # refuses a device without a number
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = settings()
    with process_settings(CUDA, deterministic=deterministic):
        assert settings() == (deterministic, not deterministic) and entered == [CUDA]
    assert settings() == before == (False, False)


def test_threads_are_restored():
    before = torch.get_num_threads()
    with process_settings(torch.device("cpu"), threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_placement_seeds_as_torch_does():
    seed = 2**63 - 5
    torch.manual_seed(seed)
    expected = torch.rand(5), torch.randn(5)
    torch.rand(3)
    Placement(torch.device("cpu")).seed(seed)
    assert torch.equal(torch.rand(5), expected[0]) and torch.equal(torch.randn(5), expected[1])
