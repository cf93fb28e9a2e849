# make demo    phantoms -> tiles -> a small pre-trained backbone, minutes on two CPU cores
# make test    all tests
# make lint    formatter, linter, types
# make audit   known weaknesses of the installed packages, secrets in the files; needs the internet
# Each makes .venv and installs what it needs; VENV= (empty) uses the active environment instead.

VENV ?= .venv
PYTHON ?= python3
BIN := $(if $(VENV),$(VENV)/bin/,)
RUN := $(BIN)$(if $(VENV),python,$(PYTHON))

.PHONY: demo test lint audit clean

demo: $(if $(VENV),$(VENV)/.installed)
	$(RUN) synthetic_mammograms.py --output_dir demo/archive --studies 8 --height 1760 --width 1400
	$(RUN) prepare_dataset.py --csv_path demo/archive/breast-level_annotations.csv \
	    --findings_csv demo/archive/finding_annotations.csv \
	    --images_root demo/archive/images_png --output_dir demo/split_images
	$(RUN) train_byol_mammo.py --data_dir demo/split_images/training --output_dir demo/runs \
	    --cache_dir demo/cache --tile_size 256 --tile_stride 128 --pixel_spacing_mm 0.17 \
	    --backbone resnet18 --weights none --view_size 96 --batch_size 16 --epochs 4 --log_every 5

test: $(if $(VENV),$(VENV)/.installed-dev)
	$(RUN) -m pytest

lint: $(if $(VENV),$(VENV)/.installed-dev)
	$(BIN)ruff format --check .
	$(BIN)ruff check .
	$(RUN) -m mypy *.py

audit: $(if $(VENV),$(VENV)/.installed-dev)
	git ls-files -z | xargs -0 $(BIN)detect-secrets-hook
	$(RUN) -m pip_audit --local

clean:
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(VENV)/.installed $@
