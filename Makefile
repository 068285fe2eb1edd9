# make demo   from a bare machine to nuclei outlined in napari
# make test   from a bare machine to a tested checkout
# make lint   formatting, lint and types
# make gpu    what only an NVIDIA GPU can show: its speed and its tests (ten minutes)
.PHONY: demo test lint setup slow gpu clean
export PYTHON

setup:
	@bash .ci/setup

demo: setup
	@bash .ci/display .venv/bin/python -m napari_unet.widgets.demo

test: setup
	@bash .ci/display .venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

slow: setup
	@bash .ci/display .venv/bin/python -m pytest -m slow $(ARGS)

gpu: setup
	-.venv/bin/python benchmarks/inference.py --device cuda --side 8192
	-.venv/bin/python benchmarks/inference.py --device cuda --side 8192 --base-channels 64
	-.venv/bin/python benchmarks/training_overhead.py --device cuda
	-.venv/bin/python benchmarks/weight_map.py --device cuda
	@bash .ci/display .venv/bin/python -m pytest -k "gpu or cuda" $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
