.PHONY: setup reproduce test notebooks tensorboard clean
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin

reproduce: setup
	$(BIN)/python run_all.py --fresh --only resolution,topk,kv_downsample,models
	$(MAKE) notebooks

test: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 15) else f"needs Python 3.11 to 3.14, this is {sys.version.split()[0]}; say make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[notebooks,trace,test]'
	touch $@

notebooks: setup
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

tensorboard: setup
	$(BIN)/tensorboard --logdir $(DIR) --host localhost

clean:
	rm -rf .venv
