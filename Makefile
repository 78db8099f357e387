# Everything runs in a virtual environment of its own; TORCH picks another build (for CUDA: TORCH=torch).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUNS ?= runs
BIN := $(VENV)/bin
GUIDANCE := 1.5

.PHONY: demo test test-slow lint bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# search both embedded models at 5 and 8 network calls, then compare with diffusers' own schedulers
demo: $(VENV)/.installed
	@for model in flow vp; do \
		rm -rf "$(RUNS)/demo/$$model"; \
		$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no -m dssolver_search search \
			--config search/recipes/demo.toml --pretrained_model_name_or_path search/demo/$$model \
			--output_dir "$(RUNS)/demo/$$model/searched" || exit 1; \
		$(BIN)/python -m dssolver_search compare --pretrained_model_name_or_path search/demo/$$model --guidance_scale $(GUIDANCE) \
			--nfe 5 8 --solver "$(RUNS)/demo/$$model/searched" --output_dir "$(RUNS)/demo/$$model" || exit 1; \
	done

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest --run-slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) build dist *.egg-info
