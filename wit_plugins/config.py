"""The settings of a weighted run: one pydantic model, the same in every framework."""

from __future__ import annotations

import difflib
import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from wit_plugins.errors import WITConfigError

if TYPE_CHECKING:
    import numpy as np

# The optimizer and gradient clipping square gradients, which must stay within float32. Only ratios of weights matter.
MAX_WEIGHT = 1e12


class WITConfig(BaseModel):
    """Settings of a weighted run (the `wit:` block of a YAML file, the arguments of `WITCallback`).

    Raises:
        pydantic.ValidationError: (a `ValueError`) on an unknown key, a wrong type or a wrong value. Adapters call
            [`WITConfig.parse`], which raises [`WITConfigError`] with the same facts in one readable message.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    prompt_weight: float = Field(
        strict=True,
        ge=0,
        allow_inf_nan=False,
        description="λp, the weight of every predicted prompt token: a finite number ≥ 0. The paper's best models "
        "are mostly at 0 to 0.5. 0 is conventional instruction tuning.",
    )
    response_weight: float = Field(
        default=1.0,
        strict=True,
        ge=0,
        allow_inf_nan=False,
        description="λr, the weight of every predicted response token: a finite number ≥ 0. The paper's best models "
        "are mostly at 0.5 to 1. It and `prompt_weight` cannot both be 0.",
    )
    normalization: Literal["nonzero_tokens", "weight_sum"] = Field(
        default="nonzero_tokens",
        description="What the weighted sum is divided by, over the whole optimizer step. `nonzero_tokens` (the "
        "paper's): the number of predicted tokens whose weight is not 0. `weight_sum`: the sum of the weights, so "
        "that scaling all weights changes nothing.",
    )
    loss_impl: Literal["auto", "fused", "logits"] = Field(
        default="auto",
        description="How the loss is computed. `fused`: head and loss in one, without holding the logits of all "
        "tokens; an error if the model's head does not allow it. `logits`: from the model's own logits. `auto`: "
        "`fused` where it is possible, checked against the model's own logits in the first batch, else `logits`, with "
        "a warning that says why.",
    )
    strategies: dict[str, dict[str, Any] | list[Any]] = Field(
        default_factory=dict,
        description="Further strategies by their registered name, each with its own options, e.g. `{dft: {}}`. A "
        "list of names is short for no options. A strategy says what its options are: a mapping, or, for `spans`, a "
        "list. All weights are multiplied.",
    )

    message_weight_keys: list[str] = Field(
        default=["weight", "loss_weight", "loss_scale", "train", "loss"],
        description="The keys of a message, or of a part of its content, that say what its tokens' weights are "
        "multiplied by: a number ≥ 0, or `true` and `false` for 1 and 0. `[]` reads none.",
    )
    sample_weight_key: str | None = Field(
        default="weight",
        description="The column that says what all weights of an example are multiplied by: a number ≥ 0. `null` "
        "reads none.",
    )
    verify: int = Field(
        default=0,
        strict=True,
        ge=0,
        le=100,
        description="How many steps, from the first to the last, are kept in `wit_verify` below the output folder, so "
        "that `wit verify` can recompute them: `3` keeps the first, a middle one and the last. `0` keeps nothing. "
        "TRL's command calls it `wit_verify`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}{did_you_mean(str(key), cls.model_fields)}")
        return values

    @field_validator("prompt_weight", "response_weight")
    @classmethod
    def _in_range(cls, value: float) -> float:
        if (reason := _out_of_range(value)) is not None:
            raise ValueError(reason)
        return value

    @field_validator("message_weight_keys")
    @classmethod
    def _keys_of_messages(cls, value: list[str]) -> list[str]:
        for key in value:
            if key in ("role", "content", "from", "value", "") or value.count(key) > 1:
                raise ValueError(f"{key!r} cannot be the key of a weight, or stands there twice")
        return value

    @field_validator("strategies", mode="before")
    @classmethod
    def _names_to_options(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            if not all(isinstance(name, str) for name in value):
                raise ValueError(
                    "a list holds names only, such as [dft]; to give options, write a mapping such as {dft: {}}"
                )
            if len(set(value)) < len(value):
                raise ValueError(f"a strategy is named twice in {list(value)}")
            return {name: {} for name in value}
        if isinstance(value, Mapping):
            for name, options in value.items():
                if not (options is None or isinstance(options, (Mapping, list, tuple))):
                    raise ValueError(
                        f"the options of {name} = {options!r}: are a mapping, or a list where it takes one"
                    )
            return {name: {} if options is None else options for name, options in value.items()}
        return value

    @model_validator(mode="after")
    def _some_weight(self) -> WITConfig:
        if self.prompt_weight == 0 and self.response_weight == 0:
            raise ValueError(
                "prompt_weight and response_weight are both 0, so nothing would be trained; "
                "set response_weight: 1.0 for conventional instruction tuning"
            )
        if "wit" in self.strategies:
            raise ValueError("strategies: 'wit' is always on; set prompt_weight and response_weight instead")
        return self

    @classmethod
    def parse(cls, values: Any, source: str = "wit") -> WITConfig:
        """Build the settings from a mapping, as read from a configuration file.

        Args:
            values (`Mapping`): the settings by name.
            source (`str`): what to call them in an error message, e.g. the name of the YAML block.

        Raises:
            WITConfigError: naming every wrong key, its value and the way out.
        """
        if not isinstance(values, Mapping):
            raise WITConfigError(
                f"{source}: expected a mapping such as {{prompt_weight: 0.2, response_weight: 0.8}}, got {values!r}"
            )
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise WITConfigError(f"{source}: {_readable(error)}") from None

    def active_strategies(self) -> dict[str, dict[str, Any] | list[Any]]:
        """The strategies of this run by name, with their options: WIT first, then those named in `strategies`."""
        wit = {"prompt_weight": self.prompt_weight, "response_weight": self.response_weight}
        return {"wit": wit, **self.strategies}

    def summary(self) -> str:
        """The settings in one line, for logs and messages; which keys of the data are read, where it is unusual."""
        own = self.model_dump(exclude={"strategies"})
        usual = {
            name: type(self).model_fields[name].get_default()
            for name in ("message_weight_keys", "sample_weight_key", "verify")
        }
        parts = [f"{name}={value!r}" for name, value in own.items() if name not in usual or value != usual[name]]
        if self.strategies:
            named = (f"{name}{_in_words(options)}" for name, options in self.strategies.items())
            parts.append(f"strategies: {', '.join(named)}")
        return ", ".join(parts)


def _in_words(options: Any) -> str:
    """The options of a strategy as somebody would write them by hand, in brackets: ` (share 0.6)`."""

    def worded(value: Any, outermost: bool = False) -> str:
        if isinstance(value, Mapping):
            said = ", ".join(f"{key} {worded(inner)}" for key, inner in value.items())
            return said if outermost else f"{{{said}}}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(worded, value))}]"
        if isinstance(value, str):
            return value if value.isidentifier() else repr(value)
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)

    if not options:
        return ""
    several = options if isinstance(options, (list, tuple)) else [options]
    return f" ({'; '.join(worded(one, True) for one in several)})"


def _out_of_range(value: float) -> str | None:
    """Why a finite weight ≥ 0 cannot be computed with; `None` if it can."""
    if value > MAX_WEIGHT:
        return (
            f"is above {MAX_WEIGHT:g}, the largest weight, since the squares of gradients would leave the range of "
            "float32; only the ratios of weights matter, so use smaller ones"
        )
    if value and not struct.unpack("f", struct.pack("f", value))[0]:
        return "is so small that float32 makes it 0; use a value such as 0.2"
    return None


def multiplied(weights: np.ndarray, factors: np.ndarray | float, what: str) -> np.ndarray:
    """The product of weights `[T]` and factors, float32, which is the type in which weights travel.

    Args:
        weights (`np.ndarray`): float32 `[T]`.
        factors (`np.ndarray` or `float`): `[T]`, or one for all.
        what (`str`): whose factors they are, for the message.

    Raises:
        ValueError: if a product is too large, or so small that it would be 0 in float32 and count as left out.
    """
    import numpy as np

    exact = weights.astype(np.float64) * np.asarray(factors, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):
        product = exact.astype(np.float32)
    lost = ~(np.abs(exact) <= MAX_WEIGHT) | ((product == 0) & (exact != 0))
    if lost.any():
        raise ValueError(
            f"the product of the weights is {exact[lost][0]:.3g} with {what}: it is at most {MAX_WEIGHT:g}, and not "
            "so small that float32 makes it 0; use weights nearer to 1"
        )
    return product


def checked_weight(value: Any, key: str, negative: bool = False) -> float:
    """A weight that a user wrote, if it is one. With `negative` it may be below 0.

    Raises:
        ValueError: naming the key, the value and the way out.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} = {value!r}: a weight is a finite number >= 0, such as 0.5")
    if value < 0 and not negative:
        raise ValueError(
            f"{key} = {value!r}: is below 0, under which the loss has no lower bound (a token's loss can be made as "
            "large as you like); use 0 to take tokens out"
        )
    if (reason := _out_of_range(abs(float(value)))) is not None:
        raise ValueError(f"{key} = {value!r}: {reason}")
    return float(value)


def did_you_mean(name: str, known: Any) -> str:
    """`"; did you mean 'x'?"` when a known name is close to `name`, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}… ({len(text):,} characters)"


def _readable(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            message = f"is required; add {key}: 0.2" if key == "prompt_weight" else "is required"
        elif key:
            message = f"= {_shortened(item['input'])}: {message}"
        lines.append(f"{key} {message}".strip())
    return "; ".join(lines)
