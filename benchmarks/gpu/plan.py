"""What a GPU is asked, in order of value: a table of stages, and the sizes that tell a dry run from a run."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

# In a stage's command: how long its suite may begin cases, and the folder of what it writes.
LIMIT, FOLDER = "{limit}", "{folder}"


@dataclass(frozen=True)
class Stage:
    """A process of its own.

    Args:
        name: unique; what it writes is named so.
        command: arguments of Python.
        limit: seconds, after which it is stopped.
        expected: seconds that it takes on an H100 with 16 cores.
        vital: without it the others have no sense.
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
    def writes_rows(self) -> bool:
        return "--json" in self.command

    def arguments(self, seconds: float, folder: str) -> list[str]:
        """The command with so many seconds to go, and that folder to write to."""
        return [a.replace(LIMIT, f"{_SHARE * seconds:.0f}").replace(FOLDER, folder) for a in self.command]


# Passes that do more than a plain one, by their labels: timed in bf16, where memory leaves the least time for them.
_HARDER = ("rounding=stochastic", "mask=bits", "mask=record")
_SHARE = 0.8  # of a stage's seconds in which a suite begins cases; it writes its rows after the last


@dataclass(frozen=True)
class Sizes:
    """All in which a dry run differs from a run.

    Args:
        device: of the suites.
        extensions: that are to be there.
        compared: elements whose bits are compared.
        passed, tuned, profiled, on_cpu: elements of the tensors of the passes that are timed or looked into.
        shape: of the model.
        backends: of the kernels that are timed, a regular expression.
        step_backend: of a step that is not the CUDA backend's.
        calls: rounds and seconds of passes, the same of steps.
        layers: of the model whose steps are the host's.
        threads: of the CPU.
        workers: processes of tests.
        matrix, steps, large: pytest's expressions, the last for a backend.
    """

    device: str
    extensions: tuple[str, ...]
    compared: str
    passed: str
    tuned: str
    profiled: str
    on_cpu: str
    shape: str
    backends: str
    step_backend: str
    calls: tuple[str, str, str, str]
    layers: int
    threads: int
    workers: int
    matrix: str
    steps: str
    large: str = "more_than_2_31 and {backend}"

    @property
    def per_pass(self) -> tuple[str, ...]:
        return ("--rounds", self.calls[0], "--seconds", self.calls[1])

    @property
    def per_step(self) -> tuple[str, ...]:
        return ("--rounds", self.calls[2], "--seconds", self.calls[3])


def of_gpu(cores: int) -> Sizes:
    return Sizes(
        device="cuda",
        extensions=("_native", "_cuda"),
        compared="256M",
        passed="1G",
        tuned="256M",
        profiled="64M",
        on_cpu="64M",
        shape="opt-1.3b",
        backends="triton|cuda",
        step_backend="triton",
        calls=("5", "0.3", "3", "1"),
        layers=24,
        threads=cores,
        workers=max(1, cores - 2),
        matrix="triton or cuda",
        steps="not more_than_2_31",
    )


def toy() -> Sizes:
    """Triton is interpreted where bits are compared, if its interpreter is not too old. Steps would take it minutes and
    are the native backend's, which is timed beside those that only a GPU runs, too.
    """
    return Sizes(
        device="cpu",
        extensions=("_native",),
        compared="4K",
        passed="4K",
        tuned="4K",
        profiled="4K",
        on_cpu="4K",
        shape="opt-tiny",
        backends="triton|cuda|native:scalar",
        step_backend="native",
        calls=("2", "0", "1", "0"),
        layers=1,
        threads=1,
        workers=0,
        matrix="test_matrix and nearest and none and float32 and (triton or scalar)",
        steps="test_launches_of_a_step",
    )


def stages(sizes: Sizes) -> list[Stage]:
    device = ("--device", sizes.device)
    threads = ("--threads", str(sizes.threads))
    shape = ("--shape", sizes.shape)
    of_shape = f"^{re.escape(sizes.shape)}/"
    timed = f"^(bf16|fp32)/({sizes.backends})$|^bf16/({sizes.backends})/({'|'.join(_HARDER)})$"
    step = (*shape, *device, *threads, *sizes.per_step)
    ncu = (*device, "--only", "^ncu$", "--elements", sizes.profiled, "--dtype", "bf16")
    ncu += ("--kinds", f"^(plain|{'|'.join(_HARDER)})$", "--out", f"{FOLDER}/profile")
    return [
        _suite("machine", "machine", *device, limit=40, expected=8, vital=True),
        Stage("build", ("-m", "benchmarks.gpu.build", *sizes.extensions), 120, 50),  # 5 if they came along
        _suite("bits", "bits", *device, "--elements", sizes.compared, *threads, limit=60, expected=25),
        _tests(
            "matrix",
            sizes,
            sizes.matrix,
            "backends/test_matrix.py",
            "backends/test_known_answers.py",
            limit=100,
            expected=45,
        ),
        _tests("steps", sizes, sizes.steps, "optim/test_gpu_steps.py", limit=90, expected=45),
        _suite(
            "bandwidth", "kernels", "--elements", sizes.passed, "--only", timed, *sizes.per_pass, limit=85, expected=65
        ),
        _suite(
            *("tuning", "kernels", "--elements", sizes.tuned, "--only", "tuning:", *sizes.per_pass),
            limit=55,
            expected=35,
        ),
        _suite("host", "host", *device, "--layers", str(sizes.layers), *sizes.per_pass, limit=30, expected=12),
        _suite(
            *("step", "step", *step, "--backend", sizes.step_backend, "--graphed"),
            *("--only", f"{of_shape}(MeZO|MeZO/in_forward|SparseMeZO)$"),
            limit=75,
            expected=45,
        ),
        _suite(
            *("step-cuda", "step", *step, "--backend", "cuda", "--only", f"{of_shape}MeZO(/in_forward)?$"),
            limit=50,
            expected=25,
        ),
        _suite(
            *("profile", "profile", *shape, *device, *threads, "--backend", sizes.step_backend, "--only", "^step$"),
            *("--dtype", "bf16", "--out", f"{FOLDER}/profile"),
            limit=40,
            expected=16,
        ),
        *(_suite(f"ncu-{b}", "profile", *ncu, "--backend", b, limit=45, expected=17) for b in ("triton", "cuda")),
        _suite("offload", "offload", *shape, *device, *threads, *sizes.per_step, limit=45, expected=30),
        _suite(
            *("cpu", "kernels", "--elements", sizes.on_cpu, "--only", "^(fp32|bf16)/native:(avx512|avx2)$"),
            *("--rounds", sizes.calls[2], "--seconds", sizes.calls[3]),
            limit=40,
            expected=20,
        ),
        # A fault kills what a process has on the GPU: one for each backend, and after everything else.
        *(
            _tests(
                *(f"large-{b}", sizes, sizes.large.format(backend=b), "optim/test_gpu_steps.py"),
                limit=30,
                expected=12,
                alone=True,
            )
            for b in ("triton", "cuda")
        ),
    ]


def _suite(name: str, suite: str, *arguments: str, limit: float, expected: float, **more: bool) -> Stage:
    written = ("--json", f"{FOLDER}/{name}.json", "--limit", LIMIT)
    return Stage(name, ("-m", "benchmarks", suite, *arguments, *written), limit, expected, **more)


def _tests(
    name: str, sizes: Sizes, expression: str, *files: str, limit: float, expected: float, alone: bool = False
) -> Stage:
    """Tests of these files; Triton compiles for each, so they are spread over the cores one by one."""
    spread = () if alone or importlib.util.find_spec("xdist") is None else ("-n", str(sizes.workers), "--dist", "load")
    options = ("-k", expression, "-rfEs", "--color=no", "-p", "no:cacheprovider", *spread)
    return Stage(name, ("-m", "pytest", *(f"tests/{file}" for file in files), *options), limit, expected)
