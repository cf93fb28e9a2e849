# make demo    phantoms -> tiles -> a small backbone -> a classifier, minutes on two CPU cores
# make test    all tests
# make compare random, plain BYOL and BYOL with the frequency target on 60 phantom studies, a quarter to
#              half an hour on two CPU cores (CONTRAST=1 makes half of the masses hard to see;
#              SEEDS="0 1 2" tells how much the start of the weights matters, in three times the time)
# make study   recipes against each other on real films where MAMMO_REAL_DATA has some, else on phantoms
#              (ARMS=plain,default STEPS=600 SEEDS="0 1 2"); about ten minutes a run on two CPU cores
# make lint    formatter, linter, types
# make docs    the notebook's outputs, the README's picture and the table of docs/settings.md
# make audit   known weaknesses of the installed packages, secrets in the files; needs the internet
# Each makes .venv and installs what it needs; VENV= (empty) uses the active environment instead.

VENV ?= .venv
PYTHON ?= python3
BIN := $(if $(VENV),$(VENV)/bin/,)
RUN := $(BIN)$(if $(VENV),python,$(PYTHON))

comma := ,
space := $(subst ,, )
.PHONY: demo compare study test lint docs audit clean

SIZES := --tile_size 128 --tile_stride 64 --view_size 128 --pixel_spacing_mm 0.17
CLASSIFY := --data_dir demo/split_images --labels demo/split_images/labels.csv --cache_dir demo/cache \
    --output_dir demo/runs/byol_resnet18_slim

demo: $(if $(VENV),$(VENV)/.installed)
	$(RUN) synthetic_mammograms.py --output_dir demo/archive --studies 20 --height 896 --width 704 \
	    --spacing_mm 0.17 --lesion_share 1 --lesion_contrast 1.5 --test_share 0.4 --seed $(firstword $(SEEDS))
	$(RUN) prepare_dataset.py --csv_path demo/archive/breast-level_annotations.csv \
	    --findings_csv demo/archive/finding_annotations.csv \
	    --images_root demo/archive/images_png --output_dir demo/split_images
	$(RUN) train_byol_mammo.py --data_dir demo/split_images/training --output_dir demo/runs \
	    --cache_dir demo/cache $(SIZES) --backbone resnet18_slim --weights none --freq_loss_weight 1 \
	    --batch_size 32 --epochs 8 --seed $(firstword $(SEEDS))
	$(RUN) train_classifier.py train --mode probe $(CLASSIFY) \
	    --weights demo/runs/byol_resnet18_slim/mammogram_byol_final.pth
	$(RUN) train_classifier.py evaluate $(CLASSIFY) \
	    --weights demo/runs/byol_resnet18_slim/classifier_probe/classifier_best.pth
	$(RUN) train_classifier.py compare none classic $(CLASSIFY) $(SIZES) \
	    demo/runs/byol_resnet18_slim/mammogram_byol_final.pth

CONTRAST ?= 1.5
SEEDS ?= 0
TILES := $(SIZES) --backbone resnet18
COMMON := --cache_dir demo/cache --output_dir demo/compare
LABELLED := --data_dir demo/compare/images --labels demo/compare/images/labels.csv $(TILES) $(COMMON)

compare: $(if $(VENV),$(VENV)/.installed)
	$(RUN) synthetic_mammograms.py --output_dir demo/compare/archive --studies 60 --height 896 \
	    --width 704 --spacing_mm 0.17 --lesion_share 1 --lesion_contrast $(CONTRAST) \
	    --test_share 0.4 --seed 5
	$(RUN) prepare_dataset.py --csv_path demo/compare/archive/breast-level_annotations.csv \
	    --findings_csv demo/compare/archive/finding_annotations.csv \
	    --images_root demo/compare/archive/images_png --output_dir demo/compare/images
	for seed in $(SEEDS); do \
	    for weight in 0 1; do $(RUN) train_byol_mammo.py --data_dir demo/compare/images/training \
	        --run_name weight$$weight.seed$$seed --freq_loss_weight $$weight \
	        --structure_loss_weight 0 --seed $$seed $(TILES) $(COMMON) \
	        --weights none --batch_size 32 --epochs 6 --min_convergence 0 \
	        --warmup_epochs 1 || exit; done; \
	    $(RUN) train_classifier.py compare none \
	        demo/compare/weight0.seed$$seed/mammogram_byol_final.pth \
	        demo/compare/weight1.seed$$seed/mammogram_byol_final.pth \
	        --seed $$seed --run_name compare.seed$$seed $(LABELLED) || exit; \
	done
	$(RUN) train_classifier.py train --run_name finetuned --epochs 6 $(LABELLED) \
	    --weights demo/compare/weight1.seed$(firstword $(SEEDS))/mammogram_byol_final.pth
	$(RUN) train_classifier.py evaluate --weights demo/compare/finetuned/classifier_best.pth $(LABELLED)

STEPS ?= 600
ARMS ?= plain,default
MAMMO_REAL_DATA ?= ../shared/real
FILMS := $(wildcard $(MAMMO_REAL_DATA)/cbis_mass)

study: $(if $(VENV),$(VENV)/.installed)
ifneq ($(FILMS),)
	$(RUN) tests/lay_out_real.py $(FILMS) demo/study/images
else
	$(RUN) synthetic_mammograms.py --output_dir demo/study/archive --studies 60 --height 896 \
	    --width 704 --spacing_mm 0.27 --lesion_share 1 --test_share 0.4 --seed 5
	$(RUN) prepare_dataset.py --csv_path demo/study/archive/breast-level_annotations.csv \
	    --findings_csv demo/study/archive/finding_annotations.csv \
	    --images_root demo/study/archive/images_png --output_dir demo/study/images
endif
	$(RUN) study.py --data_dir demo/study/images --output_dir demo/study --cache_dir demo/cache \
	    --arms $(ARMS) --seeds $(subst $(space),$(comma),$(SEEDS)) --steps $(STEPS)

test: $(if $(VENV),$(VENV)/.installed-dev)
	$(RUN) -m pytest

lint: $(if $(VENV),$(VENV)/.installed-dev)
	$(BIN)ruff format --check .
	$(BIN)ruff check .
	$(RUN) -m mypy *.py $(wildcard byol_mammo)

docs: $(if $(VENV),$(VENV)/.installed-dev)
	$(RUN) tests/update_docs.py

audit: $(if $(VENV),$(VENV)/.installed-dev)
	git ls-files -z | xargs -0 $(BIN)detect-secrets-hook --exclude-lines '"image/png"'
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
