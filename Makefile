# make quickstart    install, then train a classifier on data/sample, make it small and fast, and try it
# make test          the tests; make test-real: those on the real data sets and vectors;
#                    make test-matrix: every transformer architecture through the stages and to ONNX, every launcher
# make lint          ruff and mypy

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
MODEL := pytorch-model-quickstart.pt
ONNX := --onnx_path=pytorch-model-quickstart.onnx --quantized_onnx_path=pytorch-model-quickstart.onnx-quantized
CONFIG := --config=configs/config-glove-cnn.json --data_dir=data/sample

.PHONY: quickstart test test-real test-matrix lint

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

quickstart: $(VENV)/.installed
	$(RUN) preprocess.py $(CONFIG) --embedding_path=none
	$(RUN) train.py $(CONFIG) --save_path=$(MODEL)
	$(RUN) evaluate.py $(CONFIG) --model_path=$(MODEL)
	$(RUN) evaluate.py $(CONFIG) --model_path=$(MODEL) --convert_onnx --quantize_onnx $(ONNX)
	@echo; echo "Raw text, one sentence at a time, by PyTorch and then by ONNX Runtime in int8:"
	@$(RUN) evaluate.py $(CONFIG) --model_path=$(MODEL) --enable_inference > /dev/null
	@$(RUN) evaluate.py $(CONFIG) --enable_ort --quantize_onnx --enable_inference $(ONNX) > /dev/null
	@echo; echo "Three sentences, classified by the latter:"
	@printf '%s\n' "could you wake me at half past six tomorrow" "how do you say good night in portuguese" \
		"the restaurant was too loud for a table of four" | \
		$(RUN) evaluate.py --enable_ort --quantize_onnx $(ONNX) --input_path=-

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 -m "not real and not matrix" --timeout=300

test-matrix: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 -m matrix -v

test-real: $(VENV)/.installed-dev
	$(RUN) -m pytest -m real

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy
