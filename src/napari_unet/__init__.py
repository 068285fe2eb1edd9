"""U-Net segmentation for napari."""
