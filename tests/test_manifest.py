"""The plugin as npe2 finds it: from the checkout and from the built wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from npe2 import PluginManifest

ROOT = Path(__file__).parents[1]

# Run in a fresh interpreter, so that the wheel's files are those that are found.
CHECK = """
import json
from pathlib import Path
import napari_unet
from npe2 import PluginManifest
from napari_unet import sample
from napari_unet.models.library import list_models

manifest = PluginManifest.from_distribution("napari-unet")
manifest.validate_imports()
layers = sample.nuclei()
print(json.dumps({
    "package": str(Path(napari_unet.__file__).parent),
    "widgets": [w.display_name for w in manifest.contributions.widgets],
    "menus": list(manifest.contributions.menus),
    "samples": [s.key for s in manifest.contributions.sample_data],
    "sample_dir": str(sample.sample_dir()),
    "layers": [kind for _, _, kind in layers],
    "models": list(list_models()),
}))
"""


def check(path: Path | None, home: Path) -> dict:
    import json

    environment = os.environ | {
        "NAPARI_UNET_HOME": str(home),
        "QT_QPA_PLATFORM": "offscreen",
    }
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and unpack it as an installation would."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = folder.glob("napari_unet-*.whl")
    site = folder / "site"
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    return site


EXPECTED = {
    "widgets": ["Segment", "Fine-tune", "Batch", "Models"],
    "menus": ["napari/layers/segment"],
    "samples": ["nuclei", "timelapse", "membrane", "nuclei3d"],
    "layers": ["image", "labels"],
    "models": ["nuclei"],
}


def test_top_level_manifest_is_a_copy():
    packaged = ROOT / "src" / "napari_unet" / "napari.yaml"
    assert (ROOT / "napari.yaml").read_text() == packaged.read_text()


def test_manifest_in_the_checkout(tmp_path):
    found = check(None, tmp_path)
    assert Path(found["package"]) == ROOT / "src" / "napari_unet"
    assert Path(found["sample_dir"]) == ROOT / "sample_data"
    assert found.items() >= EXPECTED.items()


def test_manifest_in_the_wheel(wheel_folder, tmp_path):
    found = check(wheel_folder, tmp_path)
    assert Path(found["package"]) == wheel_folder / "napari_unet"
    assert Path(found["sample_dir"]) == wheel_folder / "napari_unet" / "sample_data"
    assert found.items() >= EXPECTED.items()


@pytest.mark.parametrize("where", ["checkout", "wheel"])
def test_npe2_validates(where, wheel_folder, tmp_path):
    environment = dict(os.environ)
    if where == "wheel":
        environment["PYTHONPATH"] = str(wheel_folder)
    code = "from npe2.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "validate", "napari-unet"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "valid" in result.stdout


def test_every_command_is_used():
    manifest = PluginManifest.from_file(ROOT / "napari.yaml")
    contributions = manifest.contributions
    used = {w.command for w in contributions.widgets}
    used |= {s.command for s in contributions.sample_data}
    assert used == {command.id for command in contributions.commands}


def test_no_qt_binding_is_required():
    """The user's napari decides; a second binding would break it."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = " ".join(project["dependencies"]).lower()
    for binding in ("pyqt5", "pyqt6", "pyside", "napari["):
        assert binding not in required
