"""The dock widgets: the only place that imports napari and Qt."""
