# Every target sets up .venv by itself. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
RUN := $(VENV)/bin
# DALI's wheel follows the driver: CUDA 12 drivers need the cu12 build; everything else, machines without a GPU among them, takes cu13.
DALI := $(shell nvidia-smi 2>/dev/null | grep -q 'CUDA Version: 12' && echo cuda12 || echo cuda13)
READY := $(VENV)/.ready-$(DALI)

.PHONY: quickstart test long faults chaos fuzz check docs dist installed trackio kernels gpu rehearsal format bench bench-quick learning clean

quickstart: $(READY)  ## train a tiny encoder on handwritten digits, a few minutes
	$(RUN)/fastmoco quickstart --out quickstart

# One thread a worker: threads that wait for each other by spinning are slow beside any other job. One worker more than
# two cores: many tests wait for processes. Bytecode is kept, also where the machine says otherwise: hundreds of tests start
# an interpreter, which else compiles every module again. The order of files is that of tests/conftest.py.
TESTS := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(RUN)/python -m pytest --dist loadfile --no-loadscope-reorder

test: $(READY)  ## every test that this machine can run, but for the long ones
	$(TESTS) -n 3 -m "not long"

long: $(READY)  ## the tests that make test leaves out
	$(TESTS) -n 3 -m long

faults: $(READY)  ## the whole fault table: kills, full disks, lost and hung ranks, resumes at every step and on other numbers of ranks
	$(TESTS) -n 2 -m faults

# Variables: CHAOS_SEED, EVENTS, BUDGET (seconds), OUT (folder of the log), ONLY (the number of an event, to repeat it).
chaos: $(READY)  ## random kills, stops, signals, damaged files and limits; every run must end in the bits of an undisturbed one
	OMP_NUM_THREADS=1 $(RUN)/python -m benchmarks.chaos --seed $(or $(CHAOS_SEED),0) --events $(or $(EVENTS),150) --budget $(or $(BUDGET),2400) $(if $(OUT),--out "$(OUT)") $(if $(ONLY),--only $(ONLY))

# Variables: FUZZ_SEED, INPUTS, BUDGET (seconds), OUT (folder for inputs that break a rule).
fuzz: $(READY)  ## changed inputs for every parser of files, options and variables: refused by name or accepted, in 5 s and 1 GB
	OMP_NUM_THREADS=1 $(RUN)/python -m benchmarks.fuzz --seed $(or $(FUZZ_SEED),0) --inputs $(or $(INPUTS),200000) --seconds $(or $(BUDGET),3600) --keep "$(or $(OUT),fuzz-findings)"

check: $(READY)  ## format, lint, types, layering, spelling, shell scripts, packaging, Dockerfile, the site
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/codespell
	$(RUN)/shellcheck -x launch/*.sh .ci/* && $(RUN)/shellcheck -s bash benchmarks/gpu/away.sh
	$(RUN)/validate-pyproject pyproject.toml
	$(RUN)/cibuildwheel --print-build-identifiers --platform linux .
	$(RUN)/hadolint Dockerfile
	$(MAKE) docs

dist: $(READY)  ## sdist and wheels in dist/, built and checked
	$(RUN)/python tests/installed.py

# Variable: OUT (folder of the quickstart).
installed: $(READY)  ## make dist, and the quickstart by the wheel in a fresh environment away from here, and what works without a compiler
	$(RUN)/python tests/installed.py --trackio --install --out "$(or $(OUT),quickstart)"

trackio: $(READY)  ## make dist, and the test of trackio in an environment with the older Pillow that it wants; part of make installed
	$(RUN)/python tests/installed.py --trackio

# The variable silences the theme's notice about the next version of mkdocs.
docs: $(READY)  ## build the site into build/site; a broken link or a page that the navigation lacks fails
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --strict

kernels: $(READY)  ## compile every kernel configuration for sm_80, sm_90a and sm_100a, without a GPU, and check what it costs
	$(RUN)/python -m benchmarks.compiled $(if $(OUT),--out $(OUT))

# Takes the python at hand, installs nothing: for a machine that brings torch for its GPU, pytest and numpy. Variables: STAGES,
# ONLY, BUDGET (seconds), OUT, FASTMOCO_COMMIT; DRY=1 goes through every stage on the CPU. See benchmarks/gpu/__init__.py.
gpu:  ## on a GPU: kernels against float64, ceilings, training steps, tests, benchmark cases; results in $$OUT
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/pipelines:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu

# Sets itself up in .rehearsal. REHEARSAL_PYTHON takes an interpreter that has the packages already.
rehearsal:  ## what a bare GPU machine will do, on the CPU: Python 3.12, torch 2.11, no git, no C part, only what such a machine has
	$(PYTHON) tests/rehearsal.py --python312 "$(PYTHON312)" --python "$(REHEARSAL_PYTHON)"

format: $(READY)  ## rewrite the code as ruff wants it
	$(RUN)/ruff check --fix-only .
	$(RUN)/ruff format .

bench: $(READY)  ## list the benchmark cases
	$(RUN)/python -m benchmarks list

bench-quick: $(READY)  ## every benchmark case in its quick form; fails if a gate fails
	$(RUN)/python -m benchmarks run --all --quick

# FASHION and PHOTOS are folders of the source files, if they are not where Debian's packages dataset-fashion-mnist and
# plasma-workspace-wallpapers put them. What is missing is named.
learning: $(READY)  ## fails if training learns less than the newest line of benchmarks/results/learning.jsonl, about 5 CPU-minutes
	OMP_NUM_THREADS=1 $(RUN)/python -m benchmarks.learning $(if $(FASHION),--fashion "$(FASHION)") $(if $(PHOTOS),--photos "$(PHOTOS)") $(if $(FOLDER),--folder "$(FOLDER)")

$(READY): setup.py pyproject.toml constraints.txt $(wildcard kernels/fastmoco_kernels/cut_views/native/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastmoco needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(DALI),data,logging,dev]'
	@touch $@

clean:  ## remove what make built
	rm -rf $(VENV) .rehearsal build dist *.egg-info
