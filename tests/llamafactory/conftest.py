import pytest
from lfkit import place


@pytest.fixture
def workplace(tmp_path):
    """A folder with a model, its tokenizer and data; files that only look at it have one for all their tests."""
    return place(tmp_path)
