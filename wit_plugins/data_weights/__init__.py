"""Weights that stand in the data: which keys say them, and which tokens they are about."""
