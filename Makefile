# make demo    distil and train on the embedded digits, from nothing to a student's accuracy
# make test    all tests, with coverage
# make lint    ruff and mypy
# make test-oldest   the tests on the oldest supported versions (.ci/oldest-versions.txt)
# make clean   remove what builds, tools and the demo left; make distclean: the virtual environments too
# Every target makes the virtual environment it needs, and again when setup.cfg or pyproject.toml has changed.

PYTHON ?= python3
OLDEST_PYTHON ?= $(shell for python in python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python3.10 $(PYTHON); do \
	"$$python" -c '' 2>/dev/null && echo "$$python" && break; done)
WORKERS ?= 2

BIN := .venv/bin
DEMO := demo-output
PYTEST := -m pytest -q -n $(WORKERS) --dist worksteal
COVERAGE := --cov --cov-report=term
# Two makes at once must not install into one environment; the second finds the work done.
LOCKED = $(if $(shell command -v flock),flock .venv.lock) $(MAKE) --no-print-directory --silent

.PHONY: demo test lint test-oldest clean distclean .venv .venv-oldest

demo: .venv
	@$(BIN)/python -m benchmarks.demo --out $(DEMO)

test: .venv
	@$(BIN)/python $(PYTEST) $(COVERAGE)

lint: .venv
	@$(BIN)/ruff check --quiet --output-format concise
	@$(BIN)/ruff format --quiet --check
	@$(BIN)/mypy --no-error-summary

test-oldest: .venv-oldest
	@.venv-oldest/bin/python $(PYTEST)

.venv:
	@$(LOCKED) .venv/.installed

.venv-oldest: .venv
	@$(LOCKED) .venv-oldest/.installed

# uv installs in seconds what pip's resolver may ponder for minutes.
.venv/.installed: setup.cfg pyproject.toml
	@echo "Installing into .venv; PyTorch is large, so this takes a minute or more"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[digits,test,lint]'
	@touch $@

.venv-oldest/.installed: setup.cfg pyproject.toml .ci/oldest-versions.txt
	@echo "Installing the oldest supported versions into .venv-oldest"
	@$(BIN)/uv venv --quiet --clear --python "$(OLDEST_PYTHON)" .venv-oldest
	@$(BIN)/uv pip install --quiet --python .venv-oldest/bin/python -c .ci/oldest-versions.txt -e '.[digits,test]'
	@touch $@

clean:
	@rm -rf build dist *.egg-info $(DEMO) .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf .venv .venv-oldest .venv.lock
