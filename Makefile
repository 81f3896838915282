# `make demo` and `make test` need python3.11, pip and make; each installs the rest into .venv.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --progress-bar off --no-compile -q -c constraints.txt
PACKAGE_SOURCES := setup.cfg pyproject.toml constraints.txt

# Not compiled by pip: of thousands of modules only those that are imported need to be, and then
# are, once. Without that, as where this is set, each start of a process takes 17 s in place of 6.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint format docs clean

demo: $(VENV)/.installed-demo
	$(BIN)/python tools/demo.py --out exp/demo --data exp/demo_data

# More workers than cores: nearly half of the time, tests of process groups wait (measured with two).
test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder --durations=10 $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python tools/generated_docs.py

# torch first and by its exact version: a looser request could bring gigabytes of CUDA packages.
$(VENV)/.installed-demo: $(PACKAGE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(INSTALL) -e ".[demo]"
	touch $@

$(VENV)/.installed: $(VENV)/.installed-demo
	$(INSTALL) -e ".[demo,test,lint]"
	$(BIN)/python -c "import deepspeed, peft, torch.distributed.run, speechllm.train" >/dev/null
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
