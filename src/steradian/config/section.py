"""What every section of a configuration file is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Section"]


class Section(BaseModel):
    """A section: unknown keys are errors, numbers are finite, and a section never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
