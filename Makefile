# make setup | demo | test | lint | bench : each sets up all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAB_PACKAGES := systemd-container debootstrap apt-utils gpg gpg-agent gpgv openssh-client debian-archive-keyring e2fsprogs iproute2 curl gcc libc6-dev
TEST_PACKAGES := libgomp1 openssh-server haproxy shellcheck nginx-light
ROOT := $(filter 0,$(shell id -u))

.PHONY: help setup debian demo test test-unit test-lab test-slow lint bench clean

help:
	@echo "make setup      .venv from pinned and hashed requirements; Debian packages when root"
	@echo "make demo       three bare machines to a served chat completion (KEEP=1 leaves them running)"
	@echo "make test       unit tests, and lab tests on real machines when root"
	@echo "make test-slow  the exhaustive tests"
	@echo "make lint       ruff, mypy, ansible-lint, yamllint, shellcheck"
	@echo "make bench      what it costs, as ratios"

setup: $(VENV)/.complete debian

# A virtual environment needs python3-venv, which a bare Debian lacks: install it first when we may.
$(VENV)/.complete: requirements/dev.txt | debian
	@echo "building $(VENV) from requirements/dev.txt (half a minute)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --require-hashes --requirement requirements/dev.txt
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

debian:
	@scripts/debian-packages $(if $(ROOT),install,report) python3-venv $(LAB_PACKAGES) $(TEST_PACKAGES)

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo $(if $(KEEP),--keep)

test: test-unit test-lab

test-unit: setup
	$(BIN)/pytest -m "not slow and not lab" --numprocesses auto --timeout 240 --durations=10

test-lab: setup
	$(BIN)/pytest -m "lab and not slow" --durations=15

test-slow: setup
	$(BIN)/pytest -m slow

lint: setup
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/yamllint --strict .
	PATH="$(CURDIR)/$(BIN):$$PATH" ANSIBLE_HOME="$(CURDIR)/.ansible" $(BIN)/ansible-lint --offline --profile production
	shellcheck scripts/* .ci/run

bench: setup
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .ansible
