# Only python3 (3.11 or newer) and make are needed; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
HYDRA_NEXT := 1.4.0rc3
NEXT := .venv-hydra-next
PEERS_STAMP := .venv-peers/installed
RAY := .venv-ray
# Tests run on all cores, but on no more than four: each process loads torch.
PARALLEL := --numprocesses=logical --maxprocesses=4 --dist=worksteal
DEMO := outputs/demo/$(shell echo $$(date +%Y-%m-%d_%H-%M-%S)_$$PPID)

.DEFAULT_GOAL := help
.PHONY: install demo test test-hydra-next test-ray lint check bench torture lock clean help

install: $(STAMP)  ## make .venv with everything, as requirements.txt pins it
	@echo "installed: $(BIN)/mnist-cli"

demo: $(STAMP)  ## train a CNN on real digits, evaluate it, export it to ONNX; downloads no data
	$(BIN)/mnist-cli train model=cnn optim=adam dataset=digits out=$(DEMO)
	$(BIN)/mnist-cli eval checkpoint=$(DEMO)
	$(BIN)/mnist-cli export checkpoint=$(DEMO) format=onnx

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest $(PARALLEL)

# What not everybody should have goes into an environment of its own, which falls back on .venv for
# all the rest: the next Hydra, and Ray, which is large.
.venv-%/installed: requirements-%.txt $(STAMP)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/uv pip install --quiet --python $(@D)/bin/python --no-deps --require-hashes \
		--compile-bytecode -r $<
	$(BIN)/python -c 'import os, sysconfig; print(sysconfig.get_path("purelib"), os.getcwd(), sep="\n")' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fallback.pth
	@touch $@

test-hydra-next: $(NEXT)/installed  ## run the tests on the next Hydra, a pre-release
	$(NEXT)/bin/python -m pytest $(PARALLEL) --ignore tests/test_package.py

test-ray: $(RAY)/installed  ## run the tests that need Ray
	$(RAY)/bin/python -m pytest tests/test_machines.py -k ray

lint: $(STAMP)  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## what CI runs: lint and test

bench: $(STAMP) $(if $(PEERS),$(PEERS_STAMP))  ## measure speed; PEERS=1 beside Keras and JAX too
	$(BIN)/python benchmarks/run.py $(if $(PEERS),--peers-python .venv-peers/bin/python) $(BENCH)

torture: $(STAMP)  ## kill, corrupt and starve runs, for a long time
	MNIST_CLI_TORTURE=1 $(BIN)/python -m pytest $(PARALLEL) -m torture

lock: $(STAMP)  ## write requirements.txt anew after a change of pyproject.toml; UPGRADE=1 takes newer versions
	$(BIN)/uv pip compile --quiet $(if $(UPGRADE),--upgrade) --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' \
		--extra dev --output-file requirements.txt pyproject.toml
	echo 'hydra-core==$(HYDRA_NEXT)' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' --prerelease allow \
		--output-file requirements-hydra-next.txt -
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --custom-compile-command 'make lock' --constraint requirements.txt \
		--output-file benchmarks/requirements.txt benchmarks/requirements.in
	echo 'hydra-ray-launcher>=1.2.2' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' \
		--output-file requirements-ray.txt -

clean:  ## remove .venv, caches and builds; outputs/ stays
	rm -rf .venv $(NEXT) $(RAY) .venv-peers .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Every download is checked against a hash in requirements.txt: first uv itself, through the pip of
# the new environment, then all else through uv, what it builds from source included.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed; name one: make install PYTHON=python3.12" >&2; \
		exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@awk '/^uv==/,!/\\$$/' requirements.txt > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode \
		--build-constraint requirements.txt requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q mnist_cli
	@touch $@

$(PEERS_STAMP): $(STAMP) benchmarks/requirements.txt
	$(BIN)/python -m venv --clear --without-pip .venv-peers
	$(BIN)/uv pip sync --quiet --python .venv-peers/bin/python --require-hashes --compile-bytecode \
		benchmarks/requirements.txt
	@touch $@
