"""Why the CUDA backend cannot run, told apart."""

import pytest
import torch

from zo_kernels.backends import cuda

CUDA = torch.device("cuda")


class Built:
    """Stands in for zo_kernels._cuda."""

    def __init__(self, error=""):
        self.device_error = lambda: error


def a_gpu(monkeypatch, extension=None, hip=None, visible=True, capability=(9, 0)):
    monkeypatch.setattr(cuda, "_cuda", extension or Built())
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)


def test_it_runs(monkeypatch):
    a_gpu(monkeypatch)
    assert cuda.unavailable(CUDA) is None


def test_it_needs_a_cuda_tensor(monkeypatch):
    a_gpu(monkeypatch)
    assert cuda.unavailable(torch.device("cpu")) == "it works on CUDA tensors, got one on cpu"


def test_it_is_not_built(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_missing", "the CUDA extension is not built", raising=False)
    assert "not built" in cuda.unavailable(CUDA)


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ({"hip": "6.2"}, "ROCm"),
        ({"visible": False}, "torch sees no CUDA device"),
        ({"extension": Built("driver version is insufficient")}, "driver version is insufficient"),
        ({"capability": (7, 5)}, "needs a GPU of compute capability 8.0 or later, cuda has 7.5"),
    ],
)
def test_the_gpu_does_not_serve(monkeypatch, gpu, reason):
    a_gpu(monkeypatch, **gpu)
    assert reason in cuda.unavailable(CUDA)
