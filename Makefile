.PHONY: setup reproduce lint test test-all notebooks explorer wheels tensorboard clean
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin

# Each run ends with its figures, tables and report.html in results/<device>.
reproduce: setup
	$(BIN)/python run_all.py --fresh --only resolution $(if $(FULL),--full)
	$(BIN)/python run_all.py --fresh --only topk,kv_downsample,models $(if $(FULL),--full)
ifdef FULL
	# Of the device just measured, whose report is the newest.
	ATTENTION_DEVICE=$$(basename $$(dirname $$(ls -t results/*/report.html | head -1))) $(MAKE) notebooks
endif

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not (slow or slurm or notebooks or browser)"

test-all: lint
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest -n 2 --dist loadscope

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 15) else f"needs Python 3.11 to 3.14, this is {sys.version.split()[0]}; say make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[capability,notebooks,explorer,trace,test]'
	touch $@

notebooks: setup
	ls notebooks/*.ipynb | xargs -P 2 -n 4 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False

explorer: setup
	$(BIN)/python -m notebooks.explorer results

# For the Python of the machine that will install them: make wheels FOR=3.12
FOR ?= 3.12
PLATFORMS := manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux_2_28_x86_64
wheels: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir wheels $$(grep -E '^(fvcore|iopath)==' wheels.txt)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --find-links wheels --dest wheels \
		--python-version $(FOR) --implementation cp $(PLATFORMS:%=--platform %) --requirement wheels.txt

tensorboard: setup
	$(BIN)/tensorboard --logdir $(DIR) --host localhost

clean:
	rm -rf .venv
