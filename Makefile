# make demo | test | test-slow | lint | utils: see README.md. With PYTHON=python3 they use that environment as it is, not .venv.
SHELL := /bin/bash
PYTHON := .venv/bin/python
FROM := learning_curves
COPIES := $(wildcard */utils.py */cifar.py)
ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT := .venv/complete
endif

.PHONY: demo test test-slow lint utils

demo: $(ENVIRONMENT)
	rm -rf demo
	$(PYTHON) learning_curves/cifar_dgl.py --data digits --epochs 17 --save_folder demo
	$(PYTHON) learning_curves/cifar_sequential_greedy.py --data digits --epochs 17 --save_folder demo
	PARALLEL_LOG="$$(echo "$$PWD"/demo/*_cifar_dgl.log)" PICTURE="$$PWD/demo/learning_curves.png" \
	SEQUENTIAL_LOG="$$(echo "$$PWD"/demo/*_cifar_sequential_greedy.log)" \
	$(PYTHON) -m nbconvert --log-level WARN --to notebook --execute --output-dir demo learning_curves/LearningCurves.ipynb
	@echo; echo "Logs and picture:"; ls demo/*.log demo/*.png

test: $(ENVIRONMENT)
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test-slow: $(ENVIRONMENT)
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile -m slow

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

utils:  # utils.py and cifar.py, from the folder that has the new version: make utils FROM=learning_curves
	for copy in $(filter-out $(FROM:/=)/%,$(COPIES)); do cp $(FROM:/=)/$$(basename $$copy) $$copy || exit 1; done

.venv/complete: requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
