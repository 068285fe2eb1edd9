import threading

import numpy as np
import pytest
import torch
from whole_image import random_image, trained_model


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny networks run faster without handing work to threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_thread_stays():
    """Every prediction ends its threads."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("napari-unet"):
            thread.join(timeout=5)
            assert not thread.is_alive()


@pytest.fixture
def model():
    """A small 2D model."""
    return trained_model()


@pytest.fixture
def image() -> np.ndarray:
    """A plane."""
    return random_image((1, 70, 90))[0]
