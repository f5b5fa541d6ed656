"""A trainer with weights: attached to it, checked while it runs, logged and recorded."""
