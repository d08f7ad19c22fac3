# On a fresh machine: `make demo` or `make test`. Each sets up .venv first (launch/setup.sh), once, and again when
# pyproject.toml or constraints.txt have changed. PYTHON=... chooses the interpreter, ARGS=... goes to the command.
PYTHON ?=
ARGS ?=

.PHONY: demo test lint setup clean
.NOTPARALLEL:

demo: setup
	@.venv/bin/vla-jax demo $(ARGS)

test: setup
	@.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup
	@.venv/bin/python -m ruff check .

setup:
	@PYTHON='$(PYTHON)' sh launch/setup.sh

# Everything the targets above have made, except runs/.
clean:
	rm -rf .venv .oracles build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
