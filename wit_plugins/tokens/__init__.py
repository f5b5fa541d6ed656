"""Tokens: their roles, their weights, and the codes in which both travel through any collator."""
