# make venv   one .venv with everything, CPU torch, no CUDA package
# make demo   the whole funnel on the simulated world: train, compare with the oracle, recommend
# make serve  the demo over HTTP, with its page, on http://127.0.0.1:8000
# make test   every test that takes seconds          make slow   the bands on real data and the long fault runs
# make check  ruff, types, import layers              make bench  speed and memory, as ratios in one run
PYTHON ?= python3.11
BIN := .venv/bin
WORKERS ?= 2

.PHONY: venv demo serve test slow check bench format

venv: .venv/installed

# torch first and pinned: any other order can pull the CUDA build. The last two lines refuse an environment that did.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[faiss,annoy,trees,text,image,plots,maps,export,serve,bench,dev]'
	@$(BIN)/python -c "import torch; assert torch.version.cuda is None, f'a CUDA build of torch came in: {torch.__version__}'"
	@! $(BIN)/python -m pip list 2>/dev/null | grep -iE '^(nvidia-cu|cuda-toolkit|triton|fbgemm.gpu )'
	@touch .venv/installed

demo: venv
	$(BIN)/funnelrec demo

serve: venv demo.funnel/funnel.json
	$(BIN)/funnelrec serve demo.funnel

demo.funnel/funnel.json:
	$(BIN)/funnelrec demo --out demo.funnel

test: venv
	$(BIN)/python -m pytest -q -n $(WORKERS) -m 'not slow'

slow: venv
	$(BIN)/python -m pytest -q -m slow --timeout 7200

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
