"""What ms-swift imports as an external plugin (`--external_plugins`): every trainer that it makes gets the weights.

`swift-wit` adds the option, and says the settings in a variable of the environment, which torchrun's workers inherit.
"""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from swift.trainers import Seq2SeqTrainer

from wit_plugins import WITConfig, WITConfigError, attach, attached

SETTINGS = "WIT_SWIFT"  # the `wit:` block as JSON


def _weighted(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if attached(self) is None:
            attach(self, WITConfig.parse(json.loads(os.environ[SETTINGS]), "wit"))

    __init__.weighted = True  # type: ignore[attr-defined]
    return __init__


if SETTINGS not in os.environ:
    raise WITConfigError(
        f"the plugin of WIT was imported without its settings; train by `swift-wit sft config.yaml`, or set {SETTINGS} "
        'to the settings as JSON, such as {"prompt_weight": 0.2}'
    )
if not getattr(Seq2SeqTrainer.__init__, "weighted", False):
    Seq2SeqTrainer.__init__ = _weighted(Seq2SeqTrainer.__init__)
