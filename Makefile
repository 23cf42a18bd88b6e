# Every target sets up what it needs: a machine with Python 3.10 or later and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
MODELS := examples/models
EXAMPLE := examples/read_text.flow
# More than cores, for tests wait for deadlines and for other processes.
TESTERS := $(shell expr $$(nproc) \* 2)

# Tests start hundreds of processes: what those import is compiled once, whatever is set outside.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup serve test chaos lint bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'pip>=22.3'
	$(PIP) --editable '.[dev]'
	touch $@

# rapidocr carries real OCR models; its own dependencies (a second OpenCV) are left out.
$(VENV)/.models: $(VENV)/.done
	$(PIP) --no-deps 'rapidocr>=3.4,<4'
	touch $@

$(MODELS)/.done: $(VENV)/.models examples/models.py
	$(BIN)/python examples/models.py classifier $(MODELS)
	$(BIN)/python examples/models.py text $(MODELS)
	$(BIN)/python examples/models.py pictures examples/pictures
	touch $@

# DALI is large, and only the tests need it on a machine without a GPU: there it runs on the CPU.
$(VENV)/.dali: $(VENV)/.done
	$(PIP) 'nvidia-dali-cuda120>=1.50'
	touch $@

serve: $(MODELS)/.done
	@echo
	@echo "  once it serves, try in another terminal:"
	@echo "    curl --data-binary @examples/pictures/page.png http://127.0.0.1:8000/"
	@echo "  or open http://127.0.0.1:8000/ in a browser"
	@echo
	$(BIN)/flowlang serve $(EXAMPLE) $(ARGS)

test: $(MODELS)/.done $(VENV)/.dali
	$(BIN)/python -m pytest -m 'not gpu' -n $(TESTERS) --dist loadfile $(ARGS)

# A server under everything at once, for minutes; the tests have a short form of it.
chaos: $(VENV)/.done
	$(BIN)/python -m tests.serve.chaos $(ARGS)

lint: $(VENV)/.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/flowlang fmt --check examples/*.flow

# What rapidocr's own pipeline needs, to be measured beside ours.
$(VENV)/.bench: $(VENV)/.done
	$(PIP) --editable '.[bench]'
	touch $@

# Other servers, in an environment of their own: what they depend on is none of ours.
PEERS := $(VENV)/peers
$(PEERS)/.done: $(VENV)/.done
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
		litserve mosec numpy onnxruntime opencv-python-headless
	touch $@

# benchmarks.serve needs wrk too, which is no Python package.
bench: $(MODELS)/.done $(VENV)/.bench $(PEERS)/.done
	$(BIN)/python -m benchmarks.cpu $(ARGS)
	$(BIN)/python -m benchmarks.read_text
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) $(MODELS) examples/pictures .pytest_cache .mypy_cache .ruff_cache
