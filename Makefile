# make site    build the site and serve it on http://127.0.0.1:8000     make lint      ruff
# make test    every test, each in its short form                       make evidence  every check in full, into docs/evidence
# make build   build the site into site/                                make bench     the benchmarks in full
# make leaderboard   every method again, with one budget and the same seeds
PYTHON ?= python3
PORT ?= 8000
SNIPPET ?=
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet $(if $(wildcard constraints.txt),-c constraints.txt)
DEPENDENCIES := pyproject.toml $(wildcard constraints.txt)

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1
export NO_MKDOCS_2_WARNING = 1

.PHONY: site build test lint evidence leaderboard bench clean

site: build
	$(PY) hooks/serve.py --port $(PORT)

build: .venv/site.stamp
	$(PY) -m mkdocs build --strict --clean

test: lint
	tests/site/browser.sh
	$(PY) -m pytest -n 2

lint: .venv/test.stamp
	$(PY) -m ruff check .

evidence: .venv/test.stamp
	tests/site/browser.sh
	$(PY) -m pytest --evidence -v -s $(if $(SNIPPET),--snippet $(SNIPPET))

leaderboard: .venv/test.stamp
	$(PY) -m pytest --evidence -v -s --snippet benchmarks/leaderboard

bench: .venv/test.stamp
	$(PY) -m pytest --evidence -v -s --snippet benchmarks

clean:
	rm -rf .venv site .cache .pytest_cache .ruff_cache runs

.venv/pyvenv.cfg:
	$(PYTHON) -m venv .venv

.venv/site.stamp: .venv/pyvenv.cfg $(DEPENDENCIES)
	$(PIP) ".[site]"
	touch $@

.venv/test.stamp: .venv/pyvenv.cfg $(DEPENDENCIES)
	$(PIP) ".[test]"
	touch .venv/site.stamp $@
