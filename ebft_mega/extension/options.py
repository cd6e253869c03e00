"""How keys are declared: those of the configuration and those of an entry's options. No torch."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are refused, values never change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NoOptions(Section):
    """The options of an entry that has none."""


def key(default: Any, meaning: str, *, unit: str = "", allowed: str = "", **limits: Any) -> Any:
    """Declare a key with the texts that errors and the written tables of the docs use.

    Args:
        default: its value when the file does not set it; `...` if the file must set it.
        meaning: what it does, in one or two sentences.
        unit: what a number counts.
        allowed: what it accepts, for types that do not say it themselves (`config.fields.allowed_text`).
        limits: pydantic's `ge`, `gt`, `le`, `lt`.
    """
    return Field(default, description=meaning, json_schema_extra={"allowed": allowed, "unit": unit}, **limits)
