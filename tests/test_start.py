"""What nobody should wait for is not loaded: a clock on a busy machine cannot tell."""

import subprocess
import sys

import pytest

SLOW = {
    *("dask", "imagecodecs", "magicgui", "napari", "numpy", "platformdirs", "psutil"),
    *("qtpy", "rich", "safetensors", "scipy", "skimage", "superqt"),
    *("tifffile", "torch", "tqdm", "yaml", "zarr"),
}
COMMANDS = ["segment", "train", "batch", "evaluate", "models", "models import"]


def modules_after(code: str, warnings: str = "error") -> set[str]:
    """Run code in a fresh interpreter; return the modules that are loaded then."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def packages(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_importing_the_package_loads_next_to_nothing():
    added = modules_after("import napari_unet") - modules_after("")
    assert "napari_unet" in added
    assert "importlib.metadata" not in added  # slower than all else together
    assert packages(added) - {"napari_unet"} <= sys.stdlib_module_names
    assert len(added) < 50


# pydantic is not among them: typer itself imports it for the help of a command.
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_slow(command):
    arguments = [*command.split(), "--help"]
    loaded = modules_after(f"from napari_unet.cli import main; main({arguments})")
    assert "typer" in loaded
    assert not packages(loaded) & SLOW


def test_napari_finds_the_plugin_without_importing_it():
    loaded = modules_after(
        "import npe2\n"
        "manager = npe2.PluginManager()\n"
        "manager.register(npe2.PluginManifest.from_distribution('napari-unet'))\n"
        "assert 'napari-unet' in manager\n"
        "assert len(list(manager.iter_widgets())) == 4",
        warnings="ignore",  # npe2's own
    )
    assert not packages(loaded) & {"napari", "napari_unet", "torch"}
