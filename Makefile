# Every target makes the environment it needs; a second run reuses it.
PYTHON ?= python3
VENV   ?= .venv
MINUTES ?= 8
RUN    := $(VENV)/bin

.PHONY: quickstart chat test check format release clean

quickstart: $(VENV)/.ready-all
	$(RUN)/camelid quickstart --out quickstart --minutes $(MINUTES)

chat: $(VENV)/.ready-all
	$(RUN)/camelid chat "$$($(RUN)/python tools/smollm2.py)"

# As many test processes as cores, each with as many threads: a thread that waits must not spin.
test: $(VENV)/.ready-test
	-$(RUN)/python tools/smollm2.py > /dev/null
	OMP_WAIT_POLICY=passive $(RUN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term:skip-covered --durations=10

check: $(VENV)/.ready-test
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

format: $(VENV)/.ready-test
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

release:
	$(PYTHON) tools/release.py

$(VENV)/.ready-%: pyproject.toml hatch_build.py tools/environment.py $(wildcard native/*)
	$(PYTHON) tools/environment.py $(VENV) $*

clean:
	rm -rf $(VENV) quickstart .pytest_cache .mypy_cache .ruff_cache dist
