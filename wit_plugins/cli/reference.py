"""The model that a command asks: the configuration's own before training, or another one that is named."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wit_plugins.booleans import boolean
from wit_plugins.cli.driver import FrameworkDriver, Job
from wit_plugins.cli.preview.command import reasons
from wit_plugins.errors import WITConfigError

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Reference:
    """The reference: where it is, which version, and the model itself."""

    def __init__(self, driver: FrameworkDriver, job: Job, model: str | None) -> None:
        values = {**job.values, **job.overrides}
        name_key, revision_key = driver.model_keys
        self.own = model is None
        given = model or values.get(name_key)
        if not given:
            raise WITConfigError(f"{job.name}: there is no {name_key}; name the reference with --model")
        folder = Path(str(given)).expanduser()
        self.folder = folder if folder.is_dir() else None
        self.name = str(folder.absolute()) if self.folder else str(given)
        trusted = boolean("trust_remote_code", values.get("trust_remote_code") or False)
        self._options: dict[str, Any] = {"trust_remote_code": trusted}
        if self.own and values.get(revision_key):
            self._options["revision"] = str(values[revision_key])

    def identity(self) -> str:
        """What changes when the model does: its files, or its commit on the hub."""
        if self.folder is None:
            from transformers import AutoConfig

            with self._errors():
                config = AutoConfig.from_pretrained(self.name, **self._options)
            return str(getattr(config, "_commit_hash", None))
        files = [path for path in sorted(self.folder.iterdir()) if path.suffix in (".json", ".safetensors", ".bin")]
        said = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return hashlib.blake2b("\n".join(said).encode(), digest_size=8).hexdigest()

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Make sure that another model calls the tokens by the same ids.

        Raises:
            WITConfigError: if it does not. A model that has no tokenizer beside it is believed.
        """
        # transformers makes a tokenizer up for a folder without one.
        if self.own or (self.folder is not None and not any((self.folder / name).exists() for name in _TOKENIZER)):
            return
        from transformers import AutoTokenizer

        try:
            others = AutoTokenizer.from_pretrained(self.name, **self._options).get_vocab()
        except Exception:  # whatever a library says of a tokenizer that is not there
            return
        for token, number in tokenizer.get_vocab().items():
            if others.get(token, number) != number:
                raise WITConfigError(
                    f"--model = {self.name!r}: its tokenizer is another one: {token!r} is {others[token]} there and "
                    f"{number} in training; the reference must be a model of the tokenizer that trains"
                )

    def load(self) -> Any:
        """The model, in the type that it was saved in; on the GPUs if there are any."""
        import torch
        from transformers import AutoModelForCausalLM

        where = {"device_map": "auto"} if torch.cuda.is_available() else {}
        with self._errors():
            return AutoModelForCausalLM.from_pretrained(self.name, dtype="auto", **where, **self._options)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise WITConfigError(f"the reference {self.name!r} cannot be loaded: {reasons(error)}") from error
