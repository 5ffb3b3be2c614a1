# make demo | test | test-slow | lint | utils: see README.md. With PYTHON=python3 they use that environment as it is, not .venv.
SHELL := /bin/bash
PYTHON := .venv/bin/python
SHARED := utils.py cifar.py machines.py links.py
COPIES := $(wildcard $(addprefix */,$(SHARED)))
ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT := .venv/complete
endif

.PHONY: demo parallel sequential test test-slow lint utils

demo: $(ENVIRONMENT)
	@echo "Parallel DGL and sequential greedy training, side by side."
	@rm -rf demo
	@$(MAKE) --no-print-directory --jobs 2 parallel sequential
	@PARALLEL_LOG="$$(echo "$$PWD"/demo/*cifar_dgl-demo.log)" PICTURE="$$PWD/demo/learning_curves.png" \
	SEQUENTIAL_LOG="$$(echo "$$PWD"/demo/*cifar_sequential_greedy-demo.log)" \
	$(PYTHON) -m nbconvert --log-level WARN --to notebook --execute --output-dir demo learning_curves/LearningCurves.ipynb \
	2> >(grep -v IPKernelApp >&2)  # its warning that the kernel listens on this machine
	@echo; echo "Logs and picture:"; ls demo/*.log demo/*.png

DEMO := --data digits --train-size 500 --batch-size 40 --lr 0.01 --epochs 6 --threads 1 --save_folder demo --name demo
EPOCHS := grep --line-buffered "^n: "
parallel:
	@set -o pipefail; $(PYTHON) learning_curves/cifar_dgl.py $(DEMO) | $(EPOCHS) | sed -u "s/^/parallel    /"
sequential:
	@set -o pipefail; $(PYTHON) learning_curves/cifar_sequential_greedy.py $(DEMO) | $(EPOCHS) | sed -u "s/^/sequential  /"

test: $(ENVIRONMENT)
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test-slow: $(ENVIRONMENT)
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile -m slow

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

utils:  # $(SHARED), from the folder that has the new version
	$(if $(FROM),,$(error which folder has the new version? For example: make utils FROM=learning_curves))
	for new in $(wildcard $(addprefix $(FROM:/=)/,$(SHARED))); do \
	for copy in $(filter-out $(FROM:/=)/%,$(COPIES)); do \
	if [ $$(basename $$copy) = $$(basename $$new) ]; then cp $$new $$copy || exit 1; fi; done; done

.venv/complete: requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
