# Everything runs in a virtual environment of its own; TORCH picks another build (for CUDA: TORCH=torch).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUNS ?= runs
MODEL ?= flow
BIN := $(VENV)/bin
# of the tests; each has one thread
WORKERS ?= 2
# accelerate gives a process one CPU thread unless told otherwise
THREADS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
# of the GNU C library, on a CPU: memory of tensors is kept for the next ones, not given back to the system each time
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

.PHONY: demo test test-slow test-pipelines lint bench bench-search bench-processes bench-flowdcn study clean

# Names torch, which pip would else replace for the newest torchvision, which clean-fid asks for. Compiles no bytecode:
# most of it is never imported, and compiling it is half of the work.
$(VENV)/.installed: pyproject.toml tests/torchvision_on_cpu.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)" --editable ".[dev]"
	$(BIN)/python tests/torchvision_on_cpu.py
	touch $@

# search an embedded model (flow or vp) at 5 and 8 network calls, then compare with diffusers' own schedulers
demo: $(VENV)/.installed
	rm -rf "$(RUNS)/demo/$(MODEL)"
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(THREADS) \
		-m dssolver_search search --config search/recipes/demo.toml --pretrained_model_name_or_path search/demo/$(MODEL) \
		--output_dir "$(RUNS)/demo/$(MODEL)/searched"
	$(BIN)/python -m dssolver_search compare --config search/recipes/demo-compare.toml \
		--pretrained_model_name_or_path search/demo/$(MODEL) \
		--solver "$(RUNS)/demo/$(MODEL)/searched" --output_dir "$(RUNS)/demo/$(MODEL)"

# each file is one worker's, in the order of conftest.py
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed
	$(PYTEST)

test-slow: $(VENV)/.installed
	$(PYTEST) --run-slow

# every check on every pipeline, and the table of tests/pipelines/README.md
test-pipelines: $(VENV)/.installed
	$(BIN)/python -m tests.pipelines.conformance

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m tests.bench.step

# what searches cost and bring, beside the paper's recipe: some hours on two cores; killed, it goes on
bench-search: $(VENV)/.installed
	$(BIN)/python -m tests.bench.search --output "$(RUNS)/bench-search"
	$(BIN)/python -m tests.bench.search --output "$(RUNS)/bench-search" --ablation --seeds 0
	$(BIN)/python -m tests.bench.quick --output "$(RUNS)/bench-quick"
	$(BIN)/python -m tests.bench.search --memory
	$(BIN)/python -m tests.bench.search --precision
	$(BIN)/python -m tests.bench.guidance --output "$(RUNS)/bench-guidance"
	$(BIN)/python -m tests.bench.freedom

# throughput of two processes over one, on an idle machine
bench-processes: $(VENV)/.installed
	$(BIN)/python -m tests.bench.processes

# memory and time of FlowDCN beside DiT, by tokens
bench-flowdcn: $(VENV)/.installed
	$(BIN)/python -m tests.bench.flowdcn

# the paper's findings in small: trains what is not there yet (40 minutes), then measures (three core-hours, `STUDY=--plan`
# counts them); killed, it goes on. STUDY_DATA='--dataset_name parquet ..' reads CIFAR-10 from files
study: $(VENV)/.installed
	$(BIN)/python -m tests.study.models --models "$(RUNS)/study/models" $(STUDY_DATA)
	$(BIN)/python -m tests.study.study --models "$(RUNS)/study/models" --output "$(RUNS)/study" $(STUDY)

clean:
	rm -rf $(VENV) build dist *.egg-info
