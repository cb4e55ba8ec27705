# From nothing, with only make and Python 3.11 or newer: `make` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
# The first interpreter that runs, is new enough and can make environments (a name on PATH can be a dead shim).
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

# make train
DATASET = iemocap
METHOD = mculora
SEED = 66
FOLD = 1
SCHEDULE = auto
SIZE = full
DATA_ROOT =
# more arguments: for pytest (make test), papermill (make train), snakemake (make paper), jupyter (make lab) or sphinx (make html)
ARGS =

# on Windows, with make and bash at hand, environments have other folders
WHERE := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(WHERE)
STAMP := $(VENV)/.stamp
RUN_NAME = train-$(notdir $(DATASET))-$(METHOD)-$(SIZE)-$(SCHEDULE)-fold$(FOLD)-seed$(SEED)
# make paper: how many cores it may use
CORES = all
# make html: where it goes
SITE = _site

# Notebooks must run in this environment's kernel, whatever other kernels the user has; nbdev exports nothing while
# IN_TEST is set. Bytecode is kept, whatever the shell says: a hundred processes import the package.
unexport JUPYTER_PATH IN_TEST PYTHONDONTWRITEBYTECODE
export JUPYTER_PREFER_ENV_PATH = 1
# what a notebook prints is shown as it comes; a kernel's remarks on its own sockets are not
PAPERMILL = $(BIN)/papermill --kernel python3 --no-progress-bar --log-level WARNING --stdout-file - --stderr-file -
QUIET = 2> >(grep -v --line-buffered 'TCP without encryption\|KeyboardInterrupt caught in kernel' >&2)

# make audit: in an environment of its own, which uv makes
AUDIT = pip-audit==2.10.1
# make dist: the same
TWINE = twine==7.0.0
VERSION = $(shell sed -n 's/^version = //p' settings.ini)

.PHONY: help setup setup-locked lock audit train reproduce test test-notebooks test-unpinned test-lowest test-newest test-all test-faults test-order try-readme test-mutants coverage lint paper lab html publish dist release bench gpu export clean-notebooks hooks

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | \
		while IFS='|' read -r name text; do printf '  make %-16s %s\n' "$$name" "$$text"; done

# pip knows of builds of torch that uv does not look for (a CPU build in find-links), and of mirrors; uv is faster.
# Most files of these packages are never imported, so nothing is compiled on installing: importing once compiles the rest.
pinned = "$$(grep -o '^$(1)==[^ ]*' requirements.txt)"

setup: $(STAMP) ## an environment in .venv with exactly the pinned versions (needs Python 3.11 or newer)

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@$(BIN)/python -c 'import pip' 2>/dev/null || { \
		test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with the venv module was found. Install one (on Debian and" \
			"Ubuntu: python3 and python3-venv), or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }; \
		echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear "$(VENV)"; }
	@echo "installing the pinned packages into $(VENV): some minutes, the first time"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check $(call pinned,uv) $(call pinned,torch) -c constraints.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt -c constraints.txt -e . || { \
		echo "uv could not: pip does it, which takes some minutes more" >&2; \
		$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt -c constraints.txt -e .; }
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null
	@$(BIN)/python -c 'import matplotlib.pyplot, pkgutil, scipy.stats, mculora; [pkgutil.resolve_name(m.name) for m in pkgutil.walk_packages(mculora.__path__, "mculora.")]'
	@touch $@

# pip checks hashes of all packages of a command or of none, and an editable package has none: hence two commands.
setup-locked: ## the same on a machine that reaches PyPI, every package checked against its hash in requirements.lock (on Linux, PyTorch with CUDA)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with the venv module was found" >&2; exit 1; }
	@$(PYTHON) -m venv --clear "$(VENV)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null
	@touch $(STAMP)

lock: ## renew requirements.lock and constraints.txt after a change of requirements.txt; ARGS=--upgrade: all that is not pinned there
	@test -x $(BIN)/uv || $(MAKE) --no-print-directory setup
	@$(BIN)/uv pip compile requirements.txt --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command 'make lock' --output-file requirements.lock --quiet $(ARGS)
	@{ sed '/^[^#]/,$$d' constraints.txt; sed -n 's/^\([A-Za-z0-9._-]*==[^ ]*\).*/\1/p' requirements.lock; } > constraints.txt.tmp && mv constraints.txt.tmp constraints.txt

audit: $(STAMP) ## opt-in: known vulnerabilities of everything in requirements.lock; asks the advisory service, so it needs the network
	@$(BIN)/uv tool run --quiet $(AUDIT) -r requirements.lock --require-hashes --disable-pip --strict --progress-spinner off $(ARGS) || { \
		echo "make audit: a vulnerability was found, or a package could not be looked up, which says nothing of it (is the advisory service reachable from here?)" >&2; exit 1; }

train: $(STAMP) ## one training run: [DATASET=iemocap] [METHOD=mculora] [SEED=66] [FOLD=1] [SCHEDULE=auto] [SIZE=full|twin|tiny] [DATA_ROOT=]
	@mkdir -p runs/notebooks
	@$(PAPERMILL) nbs/train.ipynb 'runs/notebooks/$(RUN_NAME).ipynb' -r dataset '$(DATASET)' -r method '$(METHOD)' \
		-p seed '$(SEED)' -p fold '$(FOLD)' -r schedule '$(SCHEDULE)' -r size '$(SIZE)' \
		$(if $(DATA_ROOT),-r data_root "$$($(BIN)/python -c 'import os, sys; print(os.path.abspath(os.path.expanduser(sys.argv[1])))' '$(DATA_ROOT)')") $(ARGS) $(QUIET)
	@echo "the run as a notebook, with its pictures: runs/notebooks/$(RUN_NAME).ipynb"

reproduce: $(STAMP) ## one cheap run of each method made again and compared with its record, on twins where there are some: about 75 minutes; [ARGS="--method gcnet"]
	@MCULORA_DATA='$(DATA_ROOT)' $(BIN)/mculora reproduce $(ARGS)

# One thread a process, and a process a core; what a worker has at the end another one takes over.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4

test: $(STAMP) ## the tests, every notebook among them, side by side: minutes; [ARGS="-k notebooks"]
	@$(PYTEST) --dist loadfile $(ARGS)

test-notebooks: $(STAMP) ## the notebooks alone, as nbdev_test runs them
	@$(BIN)/nbdev_test

test-unpinned: $(STAMP) ## the tests that do not compare bytes: for machines and versions that are not the pinned ones
	@$(PYTEST) --dist loadfile -m 'not slow and not faults and not pinned' -W default $(ARGS)

# In an environment of its own. uv, the pinned one, chooses the versions, and pip installs within them: where it finds a smaller
# build of torch than the index has (a CPU build in find-links), it takes that. [TORCH=2.13.0]: the only version that is at hand.
TORCH =
test-lowest: RESOLUTION = lowest-direct
test-newest: RESOLUTION = highest
test-lowest: ## the tests that need no pinned version, with the oldest dependencies that are allowed, in an environment of its own; [TORCH=2.13.0]
test-newest: ## the same with the newest
test-lowest test-newest:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with the venv module was found" >&2; exit 1; }
	@$(PYTHON) -m venv --clear "$(VENV)/$@"
	@$(VENV)/$@/$(WHERE)/python -m pip install -qq --disable-pip-version-check $(call pinned,uv)
	@$(VENV)/$@/$(WHERE)/uv pip compile pyproject.toml --all-extras --resolution $(RESOLUTION) --python $(VENV)/$@/$(WHERE)/python --no-annotate --no-header \
		--quiet $(if $(TORCH),--override <(echo 'torch==$(TORCH)')) --output-file $(VENV)/$@/versions.txt
	@$(VENV)/$@/$(WHERE)/python -m pip install -qq --disable-pip-version-check -c $(VENV)/$@/versions.txt -e '.[clips,dev,hdf5,tuning]'
	@$(VENV)/$@/$(WHERE)/python -m ipykernel install --sys-prefix --name python3 >/dev/null
	@touch $(VENV)/$@/.stamp
	@$(MAKE) --no-print-directory test-unpinned VENV=$(VENV)/$@

test-all: $(STAMP) ## the same and what is slow and rarely breaks: every kind of data, every committed table
	@$(PYTEST) --dist loadfile -m 'not faults' $(ARGS)

test-faults: $(STAMP) ## the campaign of faults: kills, full disks, damaged and hostile files, minutes long; prints what came of it
	@$(PYTEST) --dist worksteal -m 'faults or not slow' tests/test_faults.py tests/test_hostile.py tests/test_degenerate.py $(ARGS)

try-readme: ## the README's other commands at their smallest: minutes
	@$(MAKE) --no-print-directory train SIZE=tiny
	@$(MAKE) --no-print-directory paper SIZE=tiny

test-order: $(STAMP) ## the tests in a random order, which the first line names: ARGS="--randomly-seed=N" repeats one
	@$(PYTEST) --dist loadfile -p randomly $(ARGS)

test-mutants: $(STAMP) ## opt-in: puts small faults into the code and says which test notices; [ARGS="--review | --module dpft"]
	@$(BIN)/python tests/mutants.py $(ARGS)

coverage: $(STAMP) ## which lines the tests run; a notebook's own cells are not the package's, so they count where others import them
	@rm -f .coverage .coverage.*
	@$(PYTEST) --dist loadfile --cov --cov-report= $(ARGS)
	@$(BIN)/coverage report

lint: $(STAMP) ## what is not run: ruff over package, notebooks and tests, types, who imports whom, clean notebooks, the package as exported; changes nothing
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet nbs tests workflow || { echo 'not as ruff writes it: .venv/bin/ruff format nbs tests workflow, then make export' >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@said=$$(PYTHONPATH=. $(BIN)/lint-imports --no-cache) || { echo "$$said"; exit 1; }
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_toolchain.py -k 'exactly_what or are_clean'

# One at a time: the lock is the kernel's, so a pass that was killed leaves none (Snakemake's own would stay).
paper: $(STAMP) ## every run, table and figure of the paper that is not there yet: [SIZE=full|committed|tiny] [CORES=all]
	@mkdir -p runs; exec 9>runs/.paper.lock; \
	$(BIN)/python -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || { \
		echo "another make paper is at work in this folder: wait for it, or stop it" >&2; exit 1; }; \
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/snakemake --snakefile workflow/Snakefile --cores $(CORES) --nolock --rerun-incomplete \
		--keep-going --quiet host reason rules --config size=$(SIZE) $(ARGS)

lab: $(STAMP) ## JupyterLab in nbs/; what it saves is cleaned
	@JUPYTER_CONFIG_PATH='$(CURDIR)/.jupyter' $(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

html: $(STAMP) ## the whole companion as HTML: _site/index.html
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && mkdir -p "$$tmp/pages/docs" && \
	cp -R figures nbs *.md CITATION.cff "$$tmp/pages" && cp docs/*.md "$$tmp/pages/docs" && \
	mv "$$tmp/pages/docs/index.md" "$$tmp/pages" && \
	$(BIN)/python -m sphinx -q -c docs -d "$$tmp/doctrees" $(ARGS) "$$tmp/pages" "$$tmp/html" && \
	$(BIN)/python -m mculora results explore --no-links --out "$$tmp/html/explorer.html" && \
	rm -rf '$(SITE)' && mv "$$tmp/html" '$(SITE)'
	@echo "the whole companion as HTML: $(SITE)/index.html"

# On branch gh-pages, which has nothing else; GH_TOKEN and GITHUB_REPOSITORY come from the workflow.
publish: ## what `make html` made, as the public site: for the workflow
	@test -d $(SITE) || { echo "$(SITE): found no such folder, expected what make html writes" >&2; exit 1; }
	@touch $(SITE)/.nojekyll && cd $(SITE) && git init --quiet --initial-branch gh-pages && git add --all && \
	git -c user.name=site -c user.email=site@users.noreply.github.com commit --quiet --message 'The site' && \
	git -c credential.helper='!f() { echo username=x; echo "password=$$GH_TOKEN"; }; f' \
		push --quiet --force "https://github.com/$$GITHUB_REPOSITORY" gh-pages

# From what is committed: the same bytes whoever makes it, and whenever.
dist: $(STAMP) ## the wheel, the pinned versions and an archive of the results (an RO-Crate, checked), of the last commit: dist/
	@umask 022 && rm -rf dist && mkdir dist && tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	git archive HEAD | tar -x --no-same-permissions -C "$$tmp" && \
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/uv build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir dist "$$tmp" && \
	$(BIN)/python -m mculora results pack --root "$$tmp" --out dist/mculora-$(VERSION)-results.zip && \
	$(BIN)/python -m mculora results verify dist/mculora-$(VERSION)-results.zip
	@git show HEAD:requirements.lock > dist/requirements.lock
	@rm -f dist/.gitignore && cd dist && sha256sum * > SHA256SUMS && cat SHA256SUMS

# In a job of its own: GH_TOKEN comes from the workflow.
release: dist ## dist/ as a release of the tag of this version, checked as PyPI would: for the workflow
	@test "$$(git describe --tags --exact-match)" = v$(VERSION) || { echo "the last commit is not tagged v$(VERSION)" >&2; exit 1; }
	@$(BIN)/uv tool run --quiet $(TWINE) check --strict dist/*.whl
	@gh release create v$(VERSION) dist/* --verify-tag --title v$(VERSION) --notes 'What changed: CHANGELOG.md'

bench: $(STAMP) ## seconds, memory and share of the machine's ceiling, beside a plain version: [ARGS=--json]
	@$(BIN)/mculora bench $(ARGS)

gpu: $(STAMP) ## what only a GPU can tell; [ARGS="--part methods": all of Table 1 | --size tiny --device cpu]
	@$(BIN)/python workflow/gpu.py $(ARGS)

export: $(STAMP) ## nbs/ -> mculora/
	@$(BIN)/nbdev_export

clean-notebooks: $(STAMP) ## drop the metadata that would make diffs noisy; outputs stay
	@$(BIN)/nbdev_clean

hooks: $(STAMP) ## git, in this clone: readable diffs of notebooks, and merges that leave them open-able
	@git config --local diff.jupytext.textconv "'$(abspath $(BIN))/jupytext' --quiet --to py:percent --opt comment_magics=false --opt notebook_metadata_filter=-all --opt cell_metadata_filter=tags --output -"
	@git config --local merge.nbdev-merge.name "conflicts in notebooks, with nbdev"
	@git config --local merge.nbdev-merge.driver "'$(abspath $(BIN))/nbdev_merge' %O %A %B %P"
