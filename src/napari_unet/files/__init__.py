"""Reading images and writing results; the only place that touches the disk.

Inputs are never opened for writing, and every output appears under its name only
when it is complete.
"""
