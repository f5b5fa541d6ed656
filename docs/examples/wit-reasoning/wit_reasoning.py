"""A strategy: the tokens between two marks, such as <think> and </think>, weigh less."""

import numpy as np

from wit_plugins import hookimpl


@hookimpl
def validate_options(options):
    """The ids of the two marks, and the weight of what stands between them."""
    if set(options) != {"open", "close", "weight"}:
        raise ValueError(f"needs open, close and weight, got {sorted(options)}")


@hookimpl
def static_weights(input_ids, options):
    """From the opening mark to the token before the closing one."""
    opened, closed = np.cumsum(input_ids == options["open"]), np.cumsum(input_ids == options["close"])
    return np.where(opened > closed, options["weight"], 1.0)
