# make demo   from a bare machine to nuclei outlined in napari
# make test   from a bare machine to a tested checkout
# make lint   formatting, lint and types
.PHONY: demo test lint setup slow clean
export PYTHON

setup:
	@bash .ci/setup

demo: setup
	@bash .ci/display .venv/bin/python -m napari_unet.widgets.demo

test: setup
	@bash .ci/display .venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

slow: setup
	@bash .ci/display .venv/bin/python -m pytest -m slow $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
