import gc
import os

# Before torch is imported: nothing here may reach a hub, and tests run side by side on few cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
if os.environ.get("WIT_GPU_DEVICE") != "cuda":  # the tests in tests/gpu are the ones that want one
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_environment():
    """`datasets` leaves a copy in the place of `os.environ` where it maps in several processes."""
    own = os.environ
    yield
    os.environ = own  # noqa: B003 (the very object, which others hold)


@pytest.fixture(autouse=True)
def _only_its_own_garbage():
    """The frameworks collect garbage up to five times a run, and would look through all that was ever imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # for the interpreter's own end


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
