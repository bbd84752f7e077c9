# Every target makes and uses the project's own virtual environment; nothing needs to be installed by hand.
#   make demo [MODEL=name]   the whole experiment on the bundled model, report in demo_out/
#   make reproduce [MODEL=name] [QUICK=1]   every experiment of the paper on a bundled model, into results/
#   make test                the test suite;  make test-all  also its slow tests
#   make test-sae-lens       the part of it that needs SAELens, which lives in an environment of its own
#   make lint                ruff and mypy
#   make package             the archives that would be published, in dist/, checked
#   make notebooks           run every notebook from top to bottom and keep what it shows
#   make docs                the documentation as a site, in site/
#   make benchmarks          timings, with an allocator setting that keeps page faults out of them
#   make kernels             compile every Triton kernel for GPUs that need not be here: registers, spills, shared memory
PYTHON ?= python3
# Named first and exactly: a bare range may pull a CUDA build of several GB even where a CPU wheel is at hand.
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed
# SAELens supports transformer-lens 3 only, and this environment is also where that version is tested.
LENS := .venv-sae-lens
LENS_INSTALLED := $(LENS)/.installed
# Two workers of one thread each: torch's own threads would only fight over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
# glibc returns every large temporary to the kernel by default, and timing would then measure page faults.
ALLOCATOR := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

# The scripts that time something on a CPU; the others of benchmarks/ compile, compute, or need a GPU.
TIMED := $(wildcard $(patsubst %,benchmarks/%.py,import_time interventions scan forward))

.PHONY: demo reproduce chromium test test-sae-lens test-all lint package notebooks docs benchmarks kernels clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -e '.[tests,pages,view,docs]'
	touch $@

$(LENS_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(LENS)
	$(LENS)/bin/pip install --quiet '$(TORCH)'
	$(LENS)/bin/pip install --quiet -e '.[pytest,sae-lens]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/writesae demo $(if $(MODEL),--model $(MODEL))

reproduce: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/writesae reproduce $(if $(MODEL),--model $(MODEL)) $(if $(QUICK),--quick)

# The pages are tested in a real browser: the system's own, else Debian's, else the one that Playwright brings.
chromium: $(INSTALLED)
	@command -v chromium chromium-browser google-chrome >/dev/null \
	|| { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; } \
	|| $(BIN)/python -m playwright install chromium

test: $(INSTALLED) chromium test-sae-lens
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS)

test-sae-lens: $(LENS_INSTALLED)
	$(ONE_THREAD) $(LENS)/bin/python -m pytest -n $(WORKERS) -m sae_lens tests/writesae/interop tests/benchmarks/test_sae.py
	$(ONE_THREAD) $(LENS)/bin/python -m pytest -n $(WORKERS) tests/hooked_recurrent/compat

test-all: $(INSTALLED) chromium test-sae-lens
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m 'not sae_lens'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Without isolation: the backend that tests/test_packages.py builds with, and nothing to download.
package: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

notebooks: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m notebooks.run

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

benchmarks: $(INSTALLED) $(LENS_INSTALLED)
	set -e; for script in $(TIMED); do echo "== $$script"; $(ALLOCATOR) $(BIN)/python $$script; done
	$(ALLOCATOR) $(LENS)/bin/python benchmarks/sae.py # compares with SAELens

kernels: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python benchmarks/compiled_kernels.py

clean:
	rm -rf .venv $(LENS) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache demo_out site artefacts
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
