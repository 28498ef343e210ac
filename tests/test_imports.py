"""The package needs PyTorch and nothing else; each test imports it in a fresh process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

OPTIONAL = [
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "matplotlib",
    "rich",
    "pybind11",
    "accelerate",
    "peft",
    "datasets",
]
STEP = """
import torch, zo_kernels as zo
model = torch.nn.Linear(3, 2)
before = model.weight.detach().clone()
loss = zo.MeZO(model, lr=0.1).step(lambda: model(torch.ones(3)).square().sum())
assert loss > 0 and not torch.equal(before, model.weight)
try:
    zo.noise(8, seed=1, backend="triton")
except ValueError as error:
    print(error)
"""


def blocking(modules: list[str]) -> str:
    return f"import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"


def run(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_step_works_with_pytorch_alone() -> None:
    # PyTorch itself warns if NumPy is missing; nothing else may.
    said = run(blocking(OPTIONAL) + "import warnings\nwarnings.filterwarnings('error', module='zo_kernels')\n" + STEP)
    assert "backend: 'triton' cannot run here" in said


IMPORTS = """
import os, sys, torch
before = set(sys.modules)
import zo_kernels as zo
print(*set(sys.modules) - before)
try:
    from zo_kernels.finetune import cli
except ImportError:  # of rich, which need not be there
    print()
else:
    cli.parser().format_help()
    print(*set(sys.modules) - before)
torch.set_num_threads(2)
ours, child = torch.zeros(1 << 18), torch.zeros(1 << 18)
zo.add_noise_([ours], 1, 1.0)
if hasattr(os, "fork"):
    if (pid := os.fork()) == 0:
        zo.add_noise_([child], 1, 1.0)
        torch.set_num_threads(1)
        os._exit(not torch.equal(ours, child))
    print(os.waitpid(pid, 0)[1])
"""


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What a process that only imports prints."""
    return run(IMPORTS).splitlines()


def test_importing_brings_in_nothing_optional(said: list[str]) -> None:
    """What `import torch` brings in by itself is its own affair."""
    new = said[0].split()
    assert "zo_kernels.ops" in new
    assert not [m for m in new if m.split(".")[0] in OPTIONAL]
    assert not [
        m for m in new if m.startswith(("zo_kernels.finetune", "zo_kernels.integrations", "zo_kernels.backends.triton"))
    ]


def test_help_does_not_wait_for_heavy_imports(said: list[str]) -> None:
    assert not {"transformers", "matplotlib"} & set(said[1].split())


def test_without_the_native_extension() -> None:
    """The import works, so do the other backends; the first native use says what is missing and what to do."""
    code = (
        blocking(["zo_kernels._native"])
        + """
import torch, zo_kernels as zo
from zo_kernels import backends
assert torch.isfinite(zo.noise(8, seed=1, backend="reference")).all()
assert not any(name.startswith("native") for name in backends.available(torch.device("cpu")))
w = [torch.ones(8)]
for call in (
    lambda: zo.noise(8, seed=1),
    lambda: zo.add_noise_(w, 1, 1.0),
    lambda: zo.add_noise_(w, 1, 1.0, backend="native:scalar"),
    lambda: zo.MeZO(torch.nn.Linear(2, 2), lr=0.1),
):
    try:
        call()
    except ValueError as error:
        print(error)
    else:
        raise AssertionError("did not raise")
assert torch.equal(w[0], torch.ones(8))
"""
    )
    messages = run(code).splitlines()
    assert len(messages) == 4
    for message in messages:
        assert "'native" in message and "cannot run here" in message
        assert "not built" in message and "reinstall" in message and "compiler" in message


def test_the_extension_knows_nothing_of_pytorch() -> None:
    """One build serves every version of PyTorch."""
    (folder,) = importlib.util.find_spec("zo_kernels").submodule_search_locations
    path = Path(folder) / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("zo_kernels._native", {str(path)!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert "torch" not in sys.modules
print(hex(native.philox4x32([0] * 4, [0] * 2)[0]))
"""
    assert run(code, "-S").strip() == "0x5f6fb709"  # Random123's first known answer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_passes_run_in_a_forked_child(said: list[str]) -> None:
    """PyTorch's own threads do not: GNU's OpenMP waits for the parent's."""
    assert said[2] == "0"


@pytest.mark.parametrize("name", ["blocks.find_blocks", "pinned.bytes_pinned", "streamed.bytes_on_device"])
def test_documented_names_are_found_where_they_were(name: str) -> None:
    """The documents of earlier versions import them from `zo_kernels.optim`."""
    module, function = name.split(".")
    assert callable(getattr(importlib.import_module(f"zo_kernels.optim.{module}"), function))
