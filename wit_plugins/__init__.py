"""Weighted losses for instruction tuning, in the frameworks people already train with.

`attach(trainer, WITConfig(prompt_weight=0.2, response_weight=0.8))` makes any `transformers.Trainer` train with
weights; the packages `wit_trl`, `wit_axolotl` and `wit_llamafactory` do it in their framework's own way.
"""

from wit_plugins.config import WITConfig
from wit_plugins.errors import WeightsNotAppliedError, WITConfigError, WITError
from wit_plugins.hookspecs import hookimpl
from wit_plugins.plugins import register
from wit_plugins.tokens.roles import NEITHER, PROMPT, RESPONSE
from wit_plugins.training.attach import attach, attached, detach

__version__ = "0.1.0"

__all__ = [
    "NEITHER",
    "PROMPT",
    "RESPONSE",
    "WITConfig",
    "WITConfigError",
    "WITError",
    "WeightsNotAppliedError",
    "attach",
    "attached",
    "detach",
    "hookimpl",
    "register",
]
