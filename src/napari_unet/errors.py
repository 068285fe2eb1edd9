"""The errors a user can meet. Each message says what, why and what to do."""


class UnetError(Exception):
    """Base class of every error that napari-unet raises on purpose."""

    exit_code = 1


class BadModel(UnetError):
    """A checkpoint cannot be used."""

    exit_code = 2


class NeedsTrust(BadModel):
    """A checkpoint is a program, from which weights are taken with consent only."""


class BadInput(UnetError):
    """An image, label file or argument cannot be used."""

    exit_code = 1


class BadOutput(UnetError):
    """A result cannot be written."""

    exit_code = 4


class OutOfMemory(UnetError):
    """Memory ran out on every device and at every tile size that was tried."""

    exit_code = 5


class BadCluster(UnetError):
    """A Dask scheduler or its workers cannot be reached, were lost, or do not fit."""

    exit_code = 5


class Cancelled(UnetError):
    """The user stopped the computation."""

    exit_code = 130


class Partial(UnetError):
    """Some items of a job failed; the message names them."""

    exit_code = 3
