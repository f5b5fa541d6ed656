import pytest
from headkit import V

from wit_plugins.linear_cross_entropy import chunk_plan, softmax


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 8 tokens, blocks of 3."""
    monkeypatch.setattr(chunk_plan, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(chunk_plan, "_MIN_CHUNK_TOKENS", 8)
    monkeypatch.setattr(softmax, "_BLOCK_ELEMENTS_PER_THREAD", 3 * V)
