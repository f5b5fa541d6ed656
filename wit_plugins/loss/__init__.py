"""The weighted loss: what it sums, what divides it, and the patch on the model that computes it."""
