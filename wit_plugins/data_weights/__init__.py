"""Weights that stand in the data: the keys that hold them, and the tokens that they apply to."""
