# Every target sets up what it needs: a machine with Python 3.10 or later and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS := examples/models
EXAMPLE := examples/classify.flow

.PHONY: setup serve test lint bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# rapidocr carries real OCR models; its own dependencies (a second OpenCV) are left out.
$(VENV)/.models: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --no-deps 'rapidocr>=3.4,<4'
	touch $@

$(MODELS)/.done: $(VENV)/.models examples/models.py
	$(BIN)/python examples/models.py classifier $(MODELS)
	$(BIN)/python examples/models.py text $(MODELS)
	$(BIN)/python examples/models.py pictures examples/pictures
	touch $@

serve: $(MODELS)/.done
	@echo
	@echo "  when it is ready, try in another terminal:"
	@echo "    curl --data-binary @examples/pictures/cat.jpg http://127.0.0.1:8000/"
	@echo "  or open http://127.0.0.1:8000/ in a browser"
	@echo
	$(BIN)/flowlang serve $(EXAMPLE)

test: $(MODELS)/.done
	$(BIN)/python -m pytest -m 'not gpu' $(ARGS)

lint: $(VENV)/.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/flowlang fmt --check examples/*.flow tests/programs/*.flow

bench: $(MODELS)/.done
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV) $(MODELS) examples/pictures .pytest_cache .mypy_cache .ruff_cache
