"""`wit preview` and `wit check`: what every token weighs, before training."""
