"""The versions of ms-swift that were tested; and its code, which is looked at before it is changed."""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

from wit_plugins.foreign import Framework, missing_in

FRAMEWORK = Framework("ms-swift", "ms-swift", oldest=Version("4.6.0"), newest=Version("4.6.0"))
_TRAINER = (
    "outputs = self.template.compute_sft_loss(model, inputs, num_items_in_batch=num_items_in_batch, trainer=self)",
    "loss = outputs['loss'] if isinstance(outputs, dict) else outputs[0]",
)
_SCALES = "outputs.loss * ((labels[:, 1:] != -100).sum() / num_items_in_batch)"


def check_version() -> str:
    """ms-swift's version.

    Raises:
        WITConfigError: if it is older than the tested ones. A newer one is a warning.
    """
    version = FRAMEWORK.check(Version(importlib.metadata.version(FRAMEWORK.distribution)))
    FRAMEWORK.warn_if_newer(version)
    return str(version)


def require_parts() -> None:
    """Make sure that ms-swift computes its loss as the adapter relies on.

    Raises:
        WITConfigError: if it does not.
    """
    from swift.template import Template
    from swift.trainers import Seq2SeqTrainer

    for function, pieces in ((Seq2SeqTrainer.compute_loss, _TRAINER), (Template.compute_sft_loss, (_SCALES,))):
        if (what := missing_in(function, *pieces)) is not None:
            version = Version(importlib.metadata.version(FRAMEWORK.distribution))
            raise FRAMEWORK.has_changed(version, what, "the weights could not reach its loss")
