# Everything a clone needs. `make demo` and `make test` set up what is missing first.
#
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#                        takes PyTorch's own CPU build (200 MB instead of several GB)
#   make setup SERVE=cuda     vLLM for CUDA in the serve environment (default where nvidia-smi is)

PYTHON ?= python3
TORCH ?= torch==2.13.0
SERVE ?= $(if $(shell command -v nvidia-smi),cuda,cpu)

QUANTIZE := .venv/bin
ENGINE := .venv-serve/bin
DEMO := runs/demo
# vLLM's CPU build has no 4-bit kernel for x86 without AVX-512, its CUDA build none for 8-bit
# activations from compute capability 10 on.
AVX2 := $(and $(filter cpu,$(SERVE)),$(shell grep -m1 -sw avx2 /proc/cpuinfo | grep -vw avx512f))
CAPABILITY := $(if $(filter cuda,$(SERVE)),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | cut -d. -f1))
SERVED := $(if $(AVX2),maca-w8a8,gptq maca $(if $(filter 10 11 12,$(CAPABILITY)),,maca-w8a8))
SHOWN := $(or $(word 2,$(SERVED)),$(SERVED))

.PHONY: setup peers demo test lint format clean

setup: .venv/.installed .venv-serve/.installed-$(SERVE)

.venv/.installed: requirements/quantize.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(QUANTIZE)/pip install -q $(TORCH)
	$(QUANTIZE)/pip install -q --no-deps -r requirements/quantize.txt
	$(QUANTIZE)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# The two builds of vLLM overwrite each other's files, so each begins with an empty environment.
.venv-serve/.installed-cpu: requirements/serve-cpu.txt serve/pyproject.toml serve/vllm-cpu-stub/pyproject.toml
	$(PYTHON) -m venv --clear .venv-serve
	$(ENGINE)/pip install -q $(TORCH)
	$(ENGINE)/pip install -q --no-deps -r requirements/serve-cpu.txt
	$(ENGINE)/pip install -q --no-deps --no-build-isolation ./serve/vllm-cpu-stub -e . -e ./serve
	touch $@

.venv-serve/.installed-cuda: requirements/serve-cuda.txt serve/pyproject.toml
	$(PYTHON) -m venv --clear .venv-serve
	$(ENGINE)/pip install -q --no-deps -r requirements/serve-cuda.txt
	$(ENGINE)/pip install -q --no-deps --no-build-isolation -e . -e ./serve
	touch $@

# What the board compares with, for benchmarks/board.py.
peers: .venv-peers/.installed

.venv-peers/.installed: requirements/peers.txt
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/pip install -q $(TORCH)
	.venv-peers/bin/pip install -q --no-deps -r requirements/peers.txt
	touch $@

# The main job on the embedded model: GPTQ at one length against MaCa at several, as many tokens.
demo: setup
	$(QUANTIZE)/maca-llmc quantize --output $(DEMO)/gptq --overwrite \
	    --recipe recipes/w4a16-g64.gptq.yaml --lengths 2048 --tokens 16384
	$(QUANTIZE)/maca-llmc quantize --output $(DEMO)/maca --overwrite \
	    --recipe recipes/w4a16-g64.maca.yaml --lengths 128,256,512,2048 --tokens 16384 \
	    --record-diagonals
	$(QUANTIZE)/maca-llmc quantize --output $(DEMO)/maca-w8a8 --overwrite \
	    --recipe recipes/w8a8.maca.yaml --lengths 128,256,512,2048 --tokens 16384 \
	    --record-diagonals
	$(QUANTIZE)/maca-llmc embedded-model $(DEMO)/base
ifeq ($(SERVED),maca-w8a8)
	@echo "this CPU has no AVX-512, and vLLM no 4-bit kernel for it: 4-bit models are compared in transformers"
	$(QUANTIZE)/maca-llmc evaluate $(DEMO)/base $(DEMO)/gptq $(DEMO)/maca --windows 6
endif
	$(ENGINE)/maca-serve compare $(DEMO)/base $(SERVED:%=$(DEMO)/%) --output $(DEMO)
	@echo "report: $(DEMO)/report.html"
	@echo "serve:  .venv-serve/bin/maca-serve up $(DEMO)/$(SHOWN)"
	@echo "or plain: VLLM_CPU_INT4_W4A8=0 .venv-serve/bin/vllm serve $(DEMO)/$(SHOWN) --host 127.0.0.1 --max-model-len 2048"

TESTED := runs/test-checkpoints

test: setup
	HF_HUB_OFFLINE=1 $(QUANTIZE)/python -m pytest tests/maca_llmc tests/benchmarks tests/docs
	HF_HUB_OFFLINE=1 $(QUANTIZE)/python tests/support/make_checkpoints.py $(TESTED)
	HF_HUB_OFFLINE=1 MACA_TEST_CHECKPOINTS=$(TESTED) $(ENGINE)/python -m pytest tests/maca_serve tests/benchmarks

lint: .venv/.installed
	$(QUANTIZE)/ruff check .
	$(QUANTIZE)/ruff format --check .
	$(QUANTIZE)/mypy

format: .venv/.installed
	$(QUANTIZE)/ruff check --fix .
	$(QUANTIZE)/ruff format .

clean:
	rm -rf .venv .venv-serve .venv-peers runs
