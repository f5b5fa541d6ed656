"""`wit sweep` and `wit report`: a grid of weights, trained and drawn."""
