"""`wit robustness`: how the loss of the same answers changes when their prompts are worded in another way."""
