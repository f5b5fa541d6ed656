"""What a run leaves behind: `wit_config.json` beside every checkpoint, a section in the model card."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from wit_plugins.config import WITConfig

CONFIG_NAME = "wit_config.json"
VERSION_KEY = "wit_plugins_version"
_CARD_HEADING = "## Weighted instruction tuning"


def save_config(config: WITConfig, folder: str | os.PathLike[str]) -> None:
    """Write the settings to `folder/wit_config.json`, and by which version of this package the model was trained."""
    import wit_plugins

    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config.model_dump(exclude={"verify"}), VERSION_KEY: wit_plugins.__version__}, indent=2) + "\n"
    Path(folder, CONFIG_NAME).write_text(text, encoding="utf-8")


def load_config(folder: str | os.PathLike[str]) -> WITConfig | None:
    """The settings that a checkpoint was trained with, or `None` if it was trained without weights."""
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(values, dict):
        values.pop(VERSION_KEY, None)  # says who wrote it, and is no setting
    return WITConfig.parse(values, str(path))


def warn_if_changed(config: WITConfig, checkpoint: str | os.PathLike[str]) -> None:
    """Warn if a checkpoint was trained with other settings than it is resumed with, or if that cannot be told."""
    try:
        saved = load_config(checkpoint)
    except (OSError, ValueError) as error:  # damaged, or written by a version that knows other settings
        warnings.warn(
            f"{Path(checkpoint, CONFIG_NAME)} cannot be read ({error}), so the settings cannot be compared; "
            f"{checkpoint} is resumed with {config.summary()}",
            stacklevel=3,
        )
        return
    if saved is not None and saved.model_copy(update={"verify": config.verify}) == config:
        return
    before = f"with {saved.summary()}" if saved else "without weights (it has no wit_config.json)"
    warnings.warn(f"{checkpoint} was trained {before}; it is resumed with {config.summary()}", stacklevel=3)


def add_to_model_card(config: WITConfig, path: str | os.PathLike[str]) -> None:
    """Append how the model was trained to a model card, unless the section is there already."""
    card = Path(path)
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if _CARD_HEADING in text:
        return
    section = (
        f"\n{_CARD_HEADING}\n\n"
        "This model was trained with a weighted loss ([Weighted Instruction Tuning]"
        "(https://arxiv.org/abs/2507.07817)): prompt tokens weigh "
        f"{config.prompt_weight}, response tokens {config.response_weight}, "
        f"normalization `{config.normalization}`"
        + (f", further strategies `{json.dumps(config.strategies)}`" if config.strategies else "")
        + ".\n"
    )
    card.write_text(text.rstrip("\n") + "\n" + section, encoding="utf-8")
