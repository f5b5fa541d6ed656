import pytest
from headkit import V

from wit_plugins.linear_cross_entropy import logit_sources, softmax


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 8 tokens, blocks of 3."""
    monkeypatch.setattr(logit_sources, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(logit_sources, "_MIN_CHUNK_TOKENS", 8)
    monkeypatch.setattr(softmax, "_BLOCK_ELEMENTS_PER_THREAD", 3 * V)
