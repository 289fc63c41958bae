"""Settings of the process for a device, which are restored, and seeds of its generators."""

import pytest
import torch

from exitkit.engine.devices import Placement, process_settings

CUDA = torch.device("cuda")


def settings():
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_on_a_gpu_are_deterministic_or_the_fastest(monkeypatch, deterministic):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = settings()
    with process_settings(CUDA, deterministic=deterministic):
        assert settings() == (deterministic, not deterministic)
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
