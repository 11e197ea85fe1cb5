# Each target makes the environment it needs: .venv, pinned by constraints.txt. Without --no-compile pip would compile every file of every package, also those
# that are never imported: 80 of its 160 seconds. What is imported is compiled once, and kept, also where the environment says otherwise: else each process
# would compile PyTorch anew, for 15 seconds.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PEERS := .venv-peers
# Names, or paths where no such name is on PATH: make test-floors LOWEST_PYTHON=$$HOME/.pyenv/versions/3.10.13/bin/python
LOWEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= python3.13
DOCS := .venv-docs

.PHONY: demo test test-all test-gpu test-engines engine-speed test-floors test-newest-torch test-sanitize coverage compatibility benchmark benchmark-accuracy benchmark-gpu benchmark-peers docs lint style clean

demo: $(STAMP)
	$(RUN) recipes/digits_cnn.py

# Types are checked beside the tests, which wait for processes of theirs a quarter of the time.
test: style
	$(RUN) -m mypy & types=$$!; OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow"; tests=$$?; wait $$types && exit $$tests

test-all: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

# What needs an NVIDIA GPU: Triton's kernels compiled, captured graphs, huge tensors, and DDP by NCCL. PyTorch must be its build for CUDA.
test-gpu: $(STAMP)
	$(RUN) -c "import torch; assert torch.cuda.is_available(), 'PyTorch sees no GPU'"
	$(RUN) -m pytest -q tests/test_devices.py tests/test_triton_kernels.py tests/test_triton_compiled.py tests/test_no_host_sync.py

# The kernels under AddressSanitizer: a read or a write past the end of a tensor ends the run.
SANITIZED := tests/test_native.py tests/test_native_memory.py tests/test_weight_recompute.py tests/test_operations.py tests/test_fake_quantize.py tests/test_weight_estimator.py
test-sanitize: $(STAMP)
	mkdir -p outputs
	LD_PRELOAD=$$($${CC:-gcc} -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 OMP_NUM_THREADS=1 \
	XDG_CACHE_HOME=outputs/sanitized LIGHTNING_CCO_CFLAGS="-fsanitize=address -fno-omit-frame-pointer -g -O1" \
	$(RUN) -m pytest -q -p no:cacheprovider $(SANITIZED)

# The fast tests with the lowest versions that pyproject.toml admits on the lowest Python, and with the pinned ones on the newest. uv, since pip takes long to
# find old versions that go together. PyTorch's default builds need 6 GB each: UV_TORCH_BACKEND=cpu takes its builds for CPUs, where their index can be reached.
FLOORS := hypothesis networkx openvino pytest pytest-timeout pytest-xdist transformers
test-floors: $(STAMP)
	test -x .venv-uv/bin/uv || { $(PYTHON) -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet uv; }
	test -x .venv-lowest/bin/python || .venv-uv/bin/uv venv --quiet --python $(LOWEST_PYTHON) .venv-lowest
	.venv-uv/bin/uv pip install --quiet --python .venv-lowest/bin/python -e '.[budget,export,hydra,recipes]' $(FLOORS) -c constraints-lowest.txt
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -p no:anyio -n 2 -m "not slow"
	test -x .venv-newest/bin/python || .venv-uv/bin/uv venv --quiet --python $(NEWEST_PYTHON) .venv-newest
	.venv-uv/bin/uv pip install --quiet --python .venv-newest/bin/python -e '.[export,hydra,recipes]' $(FLOORS) -c constraints.txt
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -p no:anyio -n 2 -m "not slow"

# The fast tests with the newest PyTorch that pip finds, and with everything else as it is pinned. PyTorch's default build needs 6 GB.
test-newest-torch:
	test -x .venv-torch/bin/python || $(PYTHON) -m venv .venv-torch
	grep -v -e ^torch== -e ^triton== constraints.txt > .venv-torch/constraints.txt
	.venv-torch/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[export,hydra,recipes,dev]' -c .venv-torch/constraints.txt
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-torch/bin/python -m pytest -n 2 -m "not slow"

# A table of networks on each engine, written into docs/engines.md; 20 minutes, and 2 GB for each environment: the engines' pins exclude each other's.
ENGINES := executorch litert coreml qnn
test-engines: $(STAMP) $(ENGINES:%=.venv-%/.installed)
	for engine in ort openvino; do OMP_NUM_THREADS=1 $(RUN) tests/engine_table.py $$engine || exit 1; done
	for engine in $(ENGINES); do OMP_NUM_THREADS=1 .venv-$$engine/bin/python tests/engine_table.py $$engine || exit 1; done
	.venv-qnn/bin/python -m pip install --quiet --no-compile --disable-pip-version-check pytest
	PYTHONPATH=tests .venv-qnn/bin/python -m pytest -q -c /dev/null --rootdir . --noconftest tests/export/test_qnn_canaries.py
	$(RUN) tests/engine_table.py --write

# INT8 beside float on ResNet-18, MobileNetV2 and ViT-tiny, in each engine that runs here as on a device; close everything else first. A quarter of an hour.
engine-speed: $(STAMP) .venv-executorch/.installed .venv-litert/.installed
	for engine in ort openvino; do OMP_NUM_THREADS=1 $(RUN) benchmarks/engine_speed.py $$engine || exit 1; done
	for engine in executorch litert; do OMP_NUM_THREADS=1 .venv-$$engine/bin/python benchmarks/engine_speed.py $$engine || exit 1; done
	$(RUN) tests/engine_table.py --write

$(ENGINES:%=.venv-%/.installed): .venv-%/.installed: pyproject.toml
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -e ".[$*]"
	touch $@

# The fast tests with coverage of lines and branches; also of the processes that they start.
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow" --cov --cov-report=term --cov-report=html

compatibility: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) tests/compatibility.py -n 2

# Print the tables, and write them into benchmarks/RESULTS.md and docs/performance.md.
benchmark: $(STAMP)
	$(RUN) benchmarks/qat_step.py --write
	$(RUN) benchmarks/scaling.py --write
	$(RUN) benchmarks/set_up.py --write
	$(RUN) benchmarks/accuracy.py --write
	$(RUN) benchmarks/ptq.py --write
	$(RUN) benchmarks/profile_step.py --write

# Accuracy at few bits, and that of the other tools, in their own environment; hours, and what was measured before a break is kept. Data: apt-get install dataset-fashion-mnist, or: make benchmark-accuracy DATA=FOLDER
DATA := /usr/share/datasets/fashion-mnist
benchmark-accuracy: $(STAMP) $(PEERS)/.installed
	$(RUN) benchmarks/fashion.py --resume --data $(DATA)
	$(PEERS)/bin/python -W ignore benchmarks/fashion_peers.py --resume --data $(DATA)
	$(RUN) benchmarks/fashion.py --table --write --data $(DATA)

# The step on an NVIDIA GPU; 8 minutes.
benchmark-gpu: $(STAMP)
	$(RUN) benchmarks/gpu.py --write

# The other tools need an environment of their own; a quarter of an hour. What was measured before a break is kept.
benchmark-peers: $(PEERS)/.installed
	$(PEERS)/bin/python benchmarks/peers.py --write --resume

$(PEERS)/.installed: benchmarks/requirements-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r benchmarks/requirements-peers.txt
	touch $@

# The documentation in site/; a broken link ends it. It reads the package without importing it.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet

$(DOCS)/.installed: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",' | xargs -n 1 > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r $(DOCS)/requirements.txt -c constraints.txt
	touch $@

lint: style
	$(RUN) -m mypy

style: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -e '.[export,hydra,recipes,dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) .venv-uv .venv-lowest .venv-newest .venv-torch $(ENGINES:%=.venv-%) $(DOCS) outputs site .mypy_cache .ruff_cache .pytest_cache .hypothesis
