"""What every section of the configuration is made of."""

from __future__ import annotations

from os.path import expanduser
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Path = Annotated[str, AfterValidator(expanduser)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(as_list)]


def kind_tag(default: str) -> Discriminator:
    """Choose the member of a tagged union by `kind`, which may be left out for the usual one."""

    def tag(value: Any) -> Any:
        if isinstance(value, dict):
            kind = value.get("kind", default)
            return kind if isinstance(kind, str) else repr(kind)
        return getattr(value, "kind", None)

    return Discriminator(tag)
