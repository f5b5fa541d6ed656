import os

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # before Axolotl is imported: it reports to its makers otherwise

import pytest
import torch
from gpukit import DEVICE, missing_device


@pytest.fixture(autouse=True)
def device():
    """Where the tests run: `cuda`, or `cpu` with `WIT_GPU_DEVICE=cpu`, which shows that they would."""
    if reason := missing_device():
        pytest.skip(reason)
    torch.backends.cuda.matmul.allow_tf32 = False  # a framework may have turned it on in the test before
    return DEVICE
