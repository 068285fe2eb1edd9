"""Layers to arrays and back."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels

from napari_unet.widgets._file_facts import file_facts

if TYPE_CHECKING:
    from napari.layers import Layer
    from napari.viewer import Viewer
    from numpy.typing import NDArray

    from napari_unet.inference.instances import ObjectTable
    from napari_unet.models.model import Model

# Keys in the metadata of layers that show what was computed.
PROBABILITIES = "napari-unet probabilities of"
WEIGHTS = "napari-unet weight map"
PREVIEW = "napari-unet preview"
COMPUTED = {PROBABILITIES, WEIGHTS, PREVIEW}

_image_of: weakref.WeakKeyDictionary[Labels, weakref.ref[Image]]
_image_of = weakref.WeakKeyDictionary()


def image_array(layer: Image) -> Any:
    """Return the pixels; of a multiscale layer those of the finest level."""
    return layer.data[0] if layer.multiscale else layer.data


def guess_axes(layer: Image) -> str:
    """Name the axes by the layer's labels, its file, or their number and units.

    Parameters
    ----------
    layer : Image
        Axis labels such as "t", "c", "z", "y", "x" and units of time are
        recognised.

    Returns
    -------
    str
        Letters of "TCZYX", with "S" at the end for RGB.
    """
    if axes := known_axes(layer):
        return axes
    letters = "TCZYX" if layer.ndim == 5 else "TZYX"[-layer.ndim :]
    if layer.ndim == 3 and layer.units[0].is_compatible_with("second"):
        letters = "TYX"
    return letters + ("S" if layer.rgb else "")


def known_axes(layer: Image) -> str:
    """Return the axes as the layer's labels or its file name them, or ""."""
    if axes := _labelled_axes(layer):
        return axes
    facts = file_facts(layer, image_array(layer).shape)
    return facts.axes if facts else ""


def _labelled_axes(layer: Image) -> str:
    letters = "".join(str(label)[:1].upper() for label in layer.axis_labels)
    if set(letters) <= set("TCZYX") and len(set(letters)) == len(letters):
        return letters + ("S" if layer.rgb else "")
    return ""


def is_described(layer: Image) -> bool:
    """Whether a layer says its axes and pixel size itself: its file adds nothing."""
    axes = _labelled_axes(layer)
    return bool(axes) and set(axes) & set("ZYX") <= pixel_size(layer, axes).keys()


def pixel_size(layer: Image, axes: str) -> dict[str, float]:
    """Return the layer's pixel size in µm by axis letter, as far as it is known.

    Without units a scale other than 1 is taken as µm, as most readers mean it. What
    the layer does not say, its file may.
    """
    letters = axes.replace("S", "")
    facts = file_facts(layer, image_array(layer).shape)
    in_file = facts.pixel_size if facts else {}
    sizes = {axis: size for axis, size in in_file.items() if axis in letters}
    for axis, scale, unit in zip(letters, layer.scale, layer.units, strict=True):
        if axis not in "ZYX":
            continue
        if unit.is_compatible_with("micrometer"):
            sizes[axis] = abs(float((scale * unit).to("micrometer").magnitude))
        elif unit.is_compatible_with("pixel") and scale != 1:
            sizes[axis] = abs(float(scale))  # negative where an image is flipped
    return sizes


def current_index(viewer: Viewer, layer: Image) -> tuple[int, ...]:
    """Return the index of the pixel that the sliders stand on, inside the image."""
    where = np.rint(layer.world_to_data(viewer.dims.point)).astype(int)
    shape = image_array(layer).shape[: layer.ndim]
    return tuple(int(i) for i in np.clip(where, 0, np.array(shape) - 1))


def visible_box(viewer: Viewer, layer: Image) -> tuple[slice, ...]:
    """Return the part of the image that the canvas shows, at the finest level.

    Of axes that are not displayed it is all; where the image lies outside of the
    canvas it is empty.
    """
    corners = np.asarray(layer.corner_pixels, dtype=float)
    if layer.multiscale:
        corners = corners * np.asarray(layer.downsample_factors[layer.data_level])
    shape = image_array(layer).shape[: layer.ndim]
    low = np.clip(np.floor(corners[0]), 0, shape).astype(int)
    high = np.clip(np.ceil(corners[1]) + 1, 0, shape).astype(int)
    first = viewer.dims.ndim - layer.ndim
    box = []
    for axis, (a, b, size) in enumerate(zip(low, high, shape, strict=True)):
        if axis + first not in viewer.dims.displayed:
            box.append(slice(0, size))
        elif corners[0][axis] == corners[1][axis] in (0, size - 1) and size > 1:
            box.append(slice(0, 0))  # napari clips what it cannot see to an edge
        else:
            box.append(slice(int(a), int(b)))
    return tuple(box)


def label_space(layer: Image, axes: str) -> dict[str, Any]:
    """Return the placement of an image for a Labels layer without its channels.

    Parameters
    ----------
    layer : Image
        Read now, so that it may be deleted while the labels are computed.
    axes : str
        Of the layer.

    Returns
    -------
    dict
        Keywords of `napari.layers.Labels`: scale, translate, rotate, shear,
        affine, units and axis labels.
    """
    keep = [i for i, axis in enumerate(axes.replace("S", "")) if axis != "C"]
    affine = [*keep, layer.ndim]
    space: dict[str, Any] = {
        "scale": np.asarray(layer.scale)[keep],
        "translate": np.asarray(layer.translate)[keep],
        "affine": layer.affine.affine_matrix[np.ix_(affine, affine)],
        "units": tuple(layer.units[i] for i in keep),
        "axis_labels": tuple(layer.axis_labels[i] for i in keep),
    }
    if len(keep) == layer.ndim:
        space |= {"rotate": layer.rotate, "shear": layer.shear}
    else:
        # A channel axis takes no part in rotation and shear.
        space["rotate"] = np.asarray(layer.rotate)[np.ix_(keep, keep)]
    return space


def show_labels(
    viewer: Viewer,
    layer: Labels | None,
    data: NDArray,
    name: str,
    space: dict[str, Any],
    features: dict[str, Any],
) -> Labels:
    """Update a Labels layer in place, or add one if it is gone.

    Parameters
    ----------
    viewer : Viewer
        Where it is shown.
    layer : Labels or None
        Found by identity: its name does not matter.
    data : integer array
        The labels.
    name : str
        Of a new layer.
    space : dict
        From `label_space`.
    features : dict of str to list
        One row for each label, "index" naming it.

    Returns
    -------
    Labels
    """
    if layer is None or layer not in viewer.layers or layer.ndim != data.ndim:
        layer = Labels(data, name=name, features=features, **space)
        viewer.add_layer(layer)
        return layer
    layer.data = data
    layer.features = features
    place(layer, space)
    return layer


def place(layer: Image | Labels, space: dict[str, Any]) -> None:
    """Lay a layer where `label_space` says, if it is not there."""
    for name, value in space.items():
        # Each assignment draws a large layer again, also if nothing changes by it.
        if not np.array_equal(np.asarray(getattr(layer, name)), np.asarray(value)):
            setattr(layer, name, value)


def show_probabilities(
    viewer: Viewer,
    data: Any,
    class_names: list[str],
    name: str,
    space: dict[str, Any],
) -> None:
    """Show one image layer for each class, updating those of an earlier run.

    Parameters
    ----------
    viewer : Viewer
        Where they are shown.
    data : uint8 array of shape (class, ...)
        255 means 1.
    class_names : list of str
        One for each class.
    name : str
        Of the image.
    space : dict
        From `label_space`.
    """
    lazy = data
    if not isinstance(data, np.ndarray):
        import dask.array as da  # takes a second the first time

        lazy = da.from_array(data)
    for index, class_name in enumerate(class_names):
        title = f"{name} {class_name} probability"
        key = {PROBABILITIES: title}
        old = next((layer for layer in viewer.layers if layer.metadata == key), None)
        pixels = lazy[index]
        if isinstance(old, Image) and old.ndim == pixels.ndim:
            old.data = pixels
            place(old, space)
            continue
        image = Image(
            pixels,
            name=title,
            metadata=key,
            colormap="magma",
            contrast_limits=(0, 255),
            blending="additive",
            visible=False,
            **space,
        )
        viewer.add_layer(image)


def image_layers(viewer: Viewer) -> list[Image]:
    """Return the image layers, the topmost first, without what was computed."""
    layers: list[Layer] = list(reversed(viewer.layers))
    return [
        layer
        for layer in layers
        if type(layer) is Image and not COMPUTED & layer.metadata.keys()
    ]


def note_segmentation(labels: Labels, image: Image | None) -> None:
    """Remember of which image these are the objects; names may change."""
    if image is not None:
        _image_of[labels] = weakref.ref(image)


def find_segmentation(viewer: Viewer, image: Image) -> Labels | None:
    """Return the newest layer of objects that was found in an image."""
    for labels, source in reversed(list(_image_of.items())):
        if source() is image and labels in viewer.layers:
            return labels
    return None


def looked_at(
    viewer: Viewer, layer: Image, axes: str, ndim: int, largest: int = 0
) -> dict[str, slice]:
    """Return the plane or volume that the sliders stand on, by axis letter.

    Parameters
    ----------
    viewer : Viewer
        Whose sliders.
    layer : Image
        In which image.
    axes : str
        Of the layer.
    ndim : int
        Axes that the network sees: 2 for planes, 3 for volumes.
    largest : int
        Of more pixels than that only what the canvas shows; 0 for no limit.
    """
    letters = axes.replace("S", "")
    seen = "ZYX"[-ndim:]
    shape = dict(zip(letters, image_array(layer).shape, strict=False))
    pixels = 1
    for axis in seen:
        pixels *= shape[axis]
    region: dict[str, slice] = {}
    index, box = current_index(viewer, layer), visible_box(viewer, layer)
    for axis, here, part in zip(letters, index, box, strict=True):
        if axis != "C" and axis not in seen:
            region[axis] = slice(here, here + 1)
        elif axis in seen and largest and pixels > largest:
            region[axis] = part
    return region


def table_features(
    table: ObjectTable, model: Model, pixel_size: dict[str, float]
) -> dict[str, Any]:
    """Bring the object table into the form of a Labels layer's features."""
    columns = dict(table.columns)
    if not columns:
        return {}
    features: dict[str, Any] = {"index": columns.pop("label")}
    sizes = columns.pop("size")
    spatial = "ZYX"[-model.ndim :]
    if all(axis in pixel_size for axis in spatial):
        one = 1.0
        for axis in spatial:
            one *= pixel_size[axis]
        name = "area (µm²)" if model.ndim == 2 else "volume (µm³)"
        features[name] = [size * one for size in sizes]
    features["area (pixels)" if model.ndim == 2 else "volume (voxels)"] = sizes
    features["mean probability"] = columns.pop("mean_probability")
    classes = columns.pop("class")
    names = [info.name for info in model.passport.classes]
    if len(names) > 2:
        features["class"] = [names[int(index)] for index in classes]
    return features | columns
