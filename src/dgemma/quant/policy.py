"""Which kinds of weights are kept in how many bits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..errors import ConfigError

FORMATS = ("int4", "int8", "fp8")
KEEP = "keep"  # as in the source
GROUPS = (16, 32, 64, 128)
ROW = "row"  # a group that is a whole row
# Kinds of matrices, by their names in the network, in the order of their weight. Norms and scalars are never rounded:
# they are a ten-thousandth of the model, and each one touches every activation.
KINDS = {
    "experts": re.compile(r"layers\.\d+\.experts\..+"),
    "attention": re.compile(r"layers\.\d+\.self_attn\.[qkvo]_proj\..+"),
    "mlp": re.compile(r"layers\.\d+\.mlp\..+"),
    "embedding": re.compile(r"embed_tokens\..+"),
    "conditioning": re.compile(r"self_conditioning\.(gate|up|down)_proj\..+"),
    "router": re.compile(r"layers\.\d+\.router\.proj\..+"),
}
_ROUNDED = ("experts", "attention", "mlp")
# What each choice of `--format` means. The reasons, with figures, are in docs/quantization.md.
DEFAULTS = {
    "int4": {"embedding": "int8"},
    "int8": {"embedding": "int8"},
    "fp8": {},
}


def kind_of(name: str) -> str | None:
    """The kind of the weight of that name in the network; None for norms and scalars."""
    return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(name)), None)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What becomes of each kind of weight.

    Fields:
        format: int4, int8 or fp8: of experts, attention and dense MLP. Embeddings go with it in 8 bits (in fp8 they
            are kept); router and self-conditioning are kept.
        group: inputs that share a scale in int4, or "row"; None is 64, or 32 where 64 does not divide every width.
            In int8 and fp8 a row has one scale.
        kinds: other choices: kind to int4, int8, fp8 or keep.
        search: whether scales are searched for (int4 and int8), or follow from the largest weight.

    Raises:
        ConfigError: a value is unknown, or they do not go together.
    """

    format: str
    group: int | str | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    search: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format: {self.format!r} is not one of {', '.join(FORMATS)}")
        for kind, choice in self.kinds.items():
            if kind not in KINDS:
                raise ConfigError(f"kind: {kind!r} is unknown (known: {', '.join(KINDS)})")
            if choice not in (*FORMATS, KEEP):
                raise ConfigError(f"kind: {kind}={choice} is not one of {', '.join((*FORMATS, KEEP))}")
        if self.choice("embedding") == "fp8":
            raise ConfigError("kind: embedding=fp8 has no layout that others read; use int8 or keep")
        if self.group is not None and self.group not in (ROW, *GROUPS):
            raise ConfigError(f"group: {self.group} is not one of {', '.join(map(str, GROUPS))} or row")
        if self.group is not None and "int4" not in map(self.choice, KINDS):
            raise ConfigError("group: only int4 has groups; in int8 and fp8 each row has one scale")
        if all(self.choice(kind) == KEEP for kind in KINDS):
            raise ConfigError("kind: everything is kept; there is nothing to quantise")

    def choice(self, kind: str | None) -> str:
        """int4, int8, fp8 or keep, for a kind of weight."""
        if kind is None:
            return KEEP
        default = self.format if kind in _ROUNDED else KEEP
        return self.kinds.get(kind, DEFAULTS[self.format].get(kind, default))

    def group_for(self, widths: dict[str, int]) -> int | None:
        """The group size for int4 weights of these widths (name to inputs); None is a whole row.

        Raises:
            ConfigError: no group size divides them all; names the first that does not fit.
        """
        if self.group == ROW:
            self._refuse_odd(widths, 2, "4-bit values are stored in pairs;")
            return None
        sizes = (64, 32) if self.group is None else (int(self.group),)
        for size in sizes:
            if all(width % size == 0 for width in widths.values()):
                return size
        self._refuse_odd(widths, sizes[-1], f"no multiple of {sizes[-1]}; use a smaller group, or row, or")
        raise AssertionError("a width that no size divides is odd to the last one")

    def _refuse_odd(self, widths: dict[str, int], size: int, reason: str) -> None:
        for name, width in widths.items():
            if width % size:
                raise ConfigError(f"group: {name} is {width} wide, {reason} keep its kind ({kind_of(name)})")
