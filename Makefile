# make train   set up and train a small ViT on the images inside scikit-learn
# make test    set up and run the tests but the slow ones; make test-all runs those too
# make lint    ruff and pyright
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: train test test-all lint bench clean

train: $(VENV)/.train
	$(PY) -m fastvit train $(ARGS)

test: $(VENV)/.test
	$(PY) -m pytest -n 2 -m "not slow" $(ARGS)

test-all: $(VENV)/.test
	$(PY) -m pytest -n 2 $(ARGS)

lint: $(VENV)/.lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

bench: $(VENV)/.test
	$(PY) -m pytest benchmarks --benchmark-only $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit((3, 10) > v and f"fastvit needs Python 3.10 or later; $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/.train $(VENV)/.test $(VENV)/.lint: pyproject.toml constraints.txt | $(PY)

$(VENV)/.train:
	$(INSTALL) -e '.[train]'
	@touch $@

$(VENV)/.test:
	$(INSTALL) -e '.[train,test,peers]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) -e '.[lint]'
	@touch $@
