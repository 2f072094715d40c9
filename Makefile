# make setup     .venv with the pinned packages
# make pretrain  train a ScMoE GPT on real text with two expert-parallel ranks, about five minutes
# make test      lint, types, and the tests on 1 to 4 gloo ranks that see every kind of mistake
# make test-all  the same with the slow tests, on up to 8 ranks, which .ci/run calls
# make test-gpu  what only a GPU can show, on a machine with one: docs/gpu.md

PYTHON_BIN := .venv/bin/python
INSTALLED := .venv/.installed
SHELL_SCRIPTS := .ci/run $(wildcard docker/*.sh examples/*.sh examples/*/*.sh examples/*/*.sbatch \
    tools/*.sh tools/*/*.sh)
# Some tests wait more than they compute: three at a time keep two cores busy. A module stays in one
# worker, so that what its tests share is made once; in the order of their names the long ones come
# first.
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest \
    -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: setup pretrain check test test-all test-gpu
.DELETE_ON_ERROR:

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@! test -L .venv || { echo "error: .venv is a link to another checkout's: remove it." >&2; exit 1; }
	@python=$$(tools/find_python.sh) && echo "Using $$("$$python" --version)." && \
	    "$$python" -m venv --clear .venv
	$(PYTHON_BIN) -m pip install --quiet -c constraints.txt -e '.[data,dev,hf,plot]'
	@touch $@

pretrain: $(INSTALLED)
	PATH="$(CURDIR)/.venv/bin:$$PATH" examples/quickstart/run.sh

check: $(INSTALLED)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/shellcheck --severity warning --external-sources $(SHELL_SCRIPTS)
	.venv/bin/hadolint docker/Dockerfile docker/Dockerfile.cpu

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST)

test-gpu: $(INSTALLED)
	SCMOE_GPU_TESTS=1 $(PYTHON_BIN) -m pytest tests/gpu_tests
