# make setup     .venv with the pinned packages
# make pretrain  train a ScMoE GPT on real text with two expert-parallel ranks, three to five minutes
# make test      lint, types, tests on 1 to 8 gloo ranks; 22 minutes on two cores (2026-11-27)
# make test-gpu  what only a GPU can show, on a machine with one: docs/gpu.md

PYTHON_BIN := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: setup pretrain test test-gpu
.DELETE_ON_ERROR:

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@python=$$(tools/find_python.sh) && echo "Using $$("$$python" --version)." && \
	    "$$python" -m venv --clear .venv
	$(PYTHON_BIN) -m pip install --quiet -c constraints.txt -e '.[data,dev,plot]'
	@touch $@

pretrain: $(INSTALLED)
	PATH="$(CURDIR)/.venv/bin:$$PATH" examples/quickstart/run.sh

test: $(INSTALLED)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest

test-gpu: $(INSTALLED)
	SCMOE_GPU_TESTS=1 $(PYTHON_BIN) -m pytest tests/gpu_tests
