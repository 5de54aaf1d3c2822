"""OpenAI's sampling fields and our own `diffusion` as one `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import RequestError
from ..params import SamplingParams
from .errors import from_engine, invalid
from .fields import Diffusion

MOST_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a request, and `names`: how the request spells them (and the prompt), for errors."""

    params: SamplingParams
    names: Mapping[str, str]

    def choice(self, index: int) -> SamplingParams:
        """The settings of one of several answers: seeds count upwards from the request's own."""
        if not index or self.params.seed is None:
            return self.params
        seed = self.params.seed + index
        return replace(self.params, seed=seed if seed <= MOST_SEED else seed - 2**64)


def sampling(given: Mapping[str, tuple[str, Any]], diffusion: Diffusion | None, *, prompt: str) -> Sampling:
    """Merges what is set.

    Args:
        given: SamplingParams field -> (the request's name for it, its value or None).
        diffusion: our own settings; one that is given twice is refused.
        prompt: the request's name for the prompt.

    Raises:
        ApiError: names the field that is out of range or given twice.
    """
    names = {field.name: f"diffusion.{field.name}" for field in fields(SamplingParams)}
    names |= {"prompt": prompt, "messages": prompt, "tools": "tools"}
    settings: dict[str, Any] = {}
    for field, (name, value) in given.items():
        if value is not None:
            settings[field], names[field] = value, name
    own = {} if diffusion is None else {name: getattr(diffusion, name) for name in diffusion.model_fields_set}
    for name, value in own.items():
        if value is None:
            continue
        if name in settings:
            raise invalid(f"diffusion.{name}", f"{names[name]} says the same; give one of them")
        settings[name] = value
    try:
        return Sampling(params=SamplingParams(**settings), names=names)
    except RequestError as error:
        raise from_engine(error, names) from None
