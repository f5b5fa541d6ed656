import os

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # before Axolotl is imported: it reports to its makers otherwise
# Its packing is a few lines of Python, which every process would compile anew, for eight seconds. Compiled they pack in
# the `ranks` session.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

import pytest
from axokit import Workplace


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("axolotl"))
