import os

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # before Axolotl is imported: it reports to its makers otherwise

import pytest
from axokit import Workplace


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("axolotl"))
