# The two commands: `make demo` (the main job, end to end) and `make test`.
# Both create their environment in .venv first, the demo a smaller one; nothing else needs to be installed by hand.
#
#   make demo                      simulated micrographs
#   make demo DATA=folder          your own (images|masks/{train,val,test}, see README)
#   make demo TRAIN="..."          further key=value settings of the training
#   make demo MEASURE="..."        options of the benchmark, instead of four rounds at 512x512
#   make docs                      the documentation site, as site/index.html
#   make soak                      the tests that take minutes: the live stream under faults
#   make gpu                       figures of an NVIDIA GPU in eight minutes, then its tests (PY=python3: as installed)

SUITABLE = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CLI := $(BIN)/hpddrnet-trt
# What the demo runs; the tests need the rest, too. A machine with an NVIDIA GPU gets the full TensorRT as well;
# TensorRT-RTX builds engines without one.
DEMO_EXTRAS := train,benchmark,openvino,tensorrt-rtx$(if $(shell command -v nvidia-smi),$(comma)tensorrt)
EXTRAS := $(DEMO_EXTRAS),results,mosaic,datasets,dm,fibsem,micromanager,napari,triton,polygraphy,docs,dev
comma := ,

DATA ?=
TRAIN ?=
MEASURE ?= --rounds 4 --size 512x512 --latency-only
NAME := $(if $(DATA),$(notdir $(patsubst %/,%,$(DATA))),demo)
RUN := runs/$(NAME)
MODEL := $(RUN)/$(NAME)
MINUTES ?= 8
SHAPES ?= 1x1x256x256:1x1x512x512:4x1x1024x1024
DATASET := $(or $(DATA),$(RUN)/data)

.PHONY: help demo test docs soak gpu environment clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 10

environment: $(READY)

$(DEMO_READY): pyproject.toml setup.py constraints.txt
	@$(or $(PYTHON),false) -c '$(SUITABLE)' || \
	  { echo "Python 3.11 to 3.13 is needed; call: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[$(DEMO_EXTRAS)]'
	@touch $@

$(READY): $(DEMO_READY) tests/engines/real_modules.txt
	$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	@# Real bindings that tests look at, each in a folder of its own (49 MB); without them those tests skip and say so.
	while read -r folder wheels; do $(PIP) --no-deps --target $(VENV)/real-modules/$$folder $$wheels || \
	  echo "$$wheels: not to be had here" >&2; done <tests/engines/real_modules.txt
	@touch $@

demo: $(DEMO_READY)
	$(if $(DATA),,$(CLI) datasets simulate $(DATASET) --train 24)
	$(CLI) datasets check $(DATASET) --contact-sheet $(RUN)/dataset.png
	$(BIN)/python train/train.py $(DATASET) --recipe demo run.name=$(NAME) $(TRAIN)
	$(BIN)/python train/evaluate.py $(MODEL).onnx --data $(DATASET)
	$(BIN)/python export/export_onnx.py $(MODEL).onnx $(MODEL).fp16.onnx --precision fp16 --data $(DATASET)
	$(BIN)/python export/calibrate.py $(MODEL).onnx $(MODEL).int8.onnx --data $(DATASET)
	$(BIN)/python export/build_engine.py $(MODEL).fp16.onnx --precision fp16 --shapes $(SHAPES)
	$(BIN)/python export/build_engine.py $(MODEL).int8.onnx --precision int8 --shapes $(SHAPES)
	$(CLI) segment $(DATASET) --output $(RUN)/labels --model $(MODEL).onnx
	$(BIN)/python benchmarks/benchmark.py $(RUN) --data $(DATASET) --output $(RUN)/report $(MEASURE)
	@echo
	@echo "Open $(RUN)/report/report.html (speed and accuracy), $(RUN)/labels/overlays (what was found), $(RUN)/dataset.png."
	@echo "Next:  $(CLI) segment MICROGRAPHS --model $(MODEL).onnx"
	@echo "       $(CLI) train FOLDER     a model of your own pictures and masks: docs/tutorial.md"

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist loadfile --max-worker-restart=0

DOCS_READY := $(VENV)/.docs-ready
$(DOCS_READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS_READY)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html -c docs . site
	@echo "open site/index.html"

# The live stream under faults for 20,000 frames, and whatever else is marked slow.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests

# Figures first: they end within the minutes, the tests may take longer, and failing ones lose nothing.
# PY=python3 takes an installed Python as it is, for a machine that reaches no package index.
gpu: $(if $(PY),,$(READY))
	@failed=0; \
	$(or $(PY),$(BIN)/python) benchmarks/gpu_check.py --minutes $(MINUTES) --publish benchmarks/results \
	  $(if $(DATA),--data $(DATA)) || failed=1; \
	$(or $(PY),$(BIN)/python) -m pytest -m gpu tests || failed=1; \
	exit $$failed

clean:
	rm -rf build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
