import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny networks run faster without handing work to threads."""
    torch.set_num_threads(1)
