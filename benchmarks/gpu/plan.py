"""What a GPU is asked, in order of value: a table of stages, and the sizes in which a dry run differs."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass

# In a command: the seconds within which its suite begins cases, and the folder that it writes to.
LIMIT, FOLDER = "{limit}", "{folder}"
_SHARE = 0.8  # of a stage's seconds within which its suite begins cases; it writes its rows after the last one


@dataclass(frozen=True)
class Stage:
    """A process of its own.

    Args:
        name: unique; its files are named after it.
        command: arguments of Python.
        limit: seconds, after which it is stopped.
        expected: seconds that it takes on an H100 with 16 cores.
        vital: if it fails, the others are not run.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    expected: float
    vital: bool = False

    @property
    def is_tests(self) -> bool:
        return self.command[:2] == ("-m", "pytest")

    @property
    def suite(self) -> str | None:
        """The suite that writes its rows, or None."""
        return self.command[2] if self.command[:2] == ("-m", "benchmarks") else None

    def arguments(self, seconds: float, folder: str) -> list[str]:
        """The command, with so many seconds to go and this folder to write to."""
        return [a.replace(LIMIT, f"{_SHARE * seconds:.0f}").replace(FOLDER, folder) for a in self.command]


@dataclass(frozen=True)
class Sizes:
    """All in which a dry run differs from a run on a GPU, whose values are the defaults."""

    threads: int  # of the CPU
    workers: int  # processes of tests
    device: str = "cuda"
    extensions: str = "_native _cuda"  # that must be built
    compared: str = "256M"  # elements whose bits are compared
    passed: str = "1G"  # elements of the passes that are timed,
    tuned: str = "256M"  # whose launches are varied,
    profiled: str = "64M"  # that ncu looks into,
    on_cpu: str = "64M"  # and that the CPU is timed with
    backends: str = "triton|cuda"  # whose passes are timed
    shape: str = "opt-1.3b"
    layers: int = 24  # of the model of `host`
    step_backend: str = "triton"  # of the steps that are not the CUDA backend's
    per_pass: str = "--rounds 4 --seconds 0.3"
    per_step: str = "--rounds 3 --seconds 1"
    matrix: str = "triton or cuda"  # chooses tests, as pytest's -k does
    steps: str = "not more_than_2_31"


def of_gpu(cores: int) -> Sizes:
    return Sizes(threads=cores, workers=max(1, cores - 2))


def toy() -> Sizes:
    """Triton's interpreter compares bits; it is too slow for steps, which the native backend takes."""
    return Sizes(
        threads=1,
        workers=0,
        device="cpu",
        extensions="_native",
        **dict.fromkeys(("compared", "passed", "tuned", "profiled", "on_cpu"), "4K"),
        backends="triton|cuda|native:scalar",
        shape="opt-tiny",
        layers=1,
        step_backend="native",
        per_pass="--rounds 2 --seconds 0",
        per_step="--rounds 1 --seconds 0",
        matrix="test_matrix and nearest and none and float32 and (triton or scalar)",
        steps="test_launches_of_a_step",
    )


# Passes that do more than a plain one, or less: timed in bf16, where memory leaves the least time for computing.
_HARDER = "rounding=stochastic|mask=record"
_SIGNS = "distribution=rademacher"


def stages(s: Sizes) -> list[Stage]:
    on = f"--device {s.device}"
    model = f"--shape {s.shape} {on} --threads {s.threads}"
    passes = f"^(bf16|fp32)/({s.backends})$|^bf16/({s.backends})/({_HARDER}|(directions=8/)?{_SIGNS})$"
    steps = f"^{re.escape(s.shape)}/MeZO(/in_forward)?$"
    ncu = f"profile {on} --only '^ncu$' --elements {s.profiled} --kinds '^(plain|{_HARDER}|{_SIGNS})$'"
    saved = f"--dtype bf16 --out {FOLDER}/profile"
    return [
        _suite("machine", 40, 8, f"machine {on}", vital=True),
        _stage("build", 120, 62, f"benchmarks.gpu.build {s.extensions}"),  # 5 s if the extensions came along
        _suite("bits", 60, 33, f"bits {on} --elements {s.compared} --threads {s.threads}"),
        _tests("matrix", 100, 58, "backends/test_matrix.py backends/test_known_answers.py", s.matrix, s.workers),
        _tests("steps", 90, 45, "optim/test_gpu_steps.py", s.steps, s.workers),
        _suite("bandwidth", 90, 68, f"kernels --elements {s.passed} --only '{passes}' {s.per_pass}"),
        _suite("tuning", 25, 10, f"kernels --elements {s.tuned} --only '^bf16/[^/]+/tuning:[^/]+$' {s.per_pass}"),
        _suite("host", 30, 11, f"host {on} --layers {s.layers} {s.per_pass}"),
        _suite(
            *("step", 75, 45),
            f"step {model} {s.per_step} --backend {s.step_backend} --graphed --only '{steps}|/SparseMeZO$'",
        ),
        _suite("step-cuda", 50, 25, f"step {model} {s.per_step} --backend cuda --only '{steps}'"),
        _suite("profile", 40, 16, f"profile {model} --backend {s.step_backend} --only '^step$' {saved}"),
        _suite("ncu-triton", 45, 17, f"{ncu} --backend triton {saved}"),
        _suite("ncu-cuda", 45, 17, f"{ncu} --backend cuda {saved}"),
        _suite("offload", 45, 30, f"offload {model} {s.per_step}"),
        _suite(
            *("cpu", 25, 11),
            f"kernels --elements {s.on_cpu} --only '^(fp32|bf16)/native:avx512$' {s.per_step}",
        ),
        # A fault kills what a process has on the GPU: one process for each backend, and after everything else.
        _tests("large-triton", 30, 12, "optim/test_gpu_steps.py", "more_than_2_31 and triton"),
        _tests("large-cuda", 30, 12, "optim/test_gpu_steps.py", "more_than_2_31 and cuda"),
    ]


def _stage(name: str, limit: float, expected: float, module: str, vital: bool = False) -> Stage:
    return Stage(name, ("-m", *shlex.split(module)), limit, expected, vital)


def _suite(name: str, limit: float, expected: float, command: str, vital: bool = False) -> Stage:
    written = f"--json {FOLDER}/{name}.json --limit {LIMIT}"
    return _stage(name, limit, expected, f"benchmarks {command} {written}", vital)


def _tests(name: str, limit: float, expected: float, files: str, chosen: str, workers: int | None = None) -> Stage:
    """Tests from these files. Triton compiles in each process, so they are spread over the workers one by one."""
    paths = " ".join(f"tests/{file}" for file in files.split())
    spread = "" if workers is None or importlib.util.find_spec("xdist") is None else f"-n {workers} --dist load"
    return _stage(name, limit, expected, f"pytest {paths} -k '{chosen}' -rfEs --color=no -p no:cacheprovider {spread}")
