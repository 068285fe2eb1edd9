"""The U-Net itself."""
