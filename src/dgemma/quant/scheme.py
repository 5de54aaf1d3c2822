"""`quantization_config` of a `config.json`: what it must say for the weights to be read, and what is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .layouts import FLOAT, INT, NVFP4, PACK, Layout

KEY = "quantization_config"
_MODELOPT = {"NVFP4": {("float", 4)}, "FP8": {("float", 8)}, "MIXED_PRECISION": set[tuple[str, int]]()}
_READ = (PACK, INT, FLOAT, NVFP4, "naive-quantized", "mixed-precision")
# Regular expressions for the modules of a kind; experts are numbered, one module a matrix.
_TARGETS = {
    "experts": r"re:.*\.experts\.\d+\..*",
    "attention": r"re:.*\.self_attn\..*",
    "mlp": r"re:.*\.mlp\..*",
    "embedding": r"re:.*\.embed_tokens$",
    "conditioning": r"re:.*\.self_conditioning\..*",
    "router": r"re:.*\.router\..*",
}
# Norms are no `Linear`, but some tools look at names alone, and at those that end in "weight".
_IGNORED = ["lm_head", r"re:.*norm.*", r"re:.*\.vision_tower\..*", r"re:.*\.embed_vision\..*"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What `quantization_config` says.

    Fields:
        method: compressed-tensors or modelopt.
        bits: (type, bits) of the weights of each group: ("int", 4), ("float", 8), ...; empty where it does not say.
    """

    method: str
    bits: frozenset[tuple[str, int]]

    @classmethod
    def read(cls, config: dict[str, Any]) -> Scheme | None:
        """Reads the section of a `config.json`'s content; None where there is none.

        Raises:
            ConfigError: it describes what is not read.
        """
        section = config.get(KEY)
        if section is None:
            return None
        if not isinstance(section, dict):
            raise ConfigError(f"{KEY}: holds no JSON object")
        method = section.get("quant_method", "compressed-tensors" if "config_groups" in section else None)
        if method == "modelopt":
            algorithm = section.get("quant_algo")
            if algorithm not in _MODELOPT:
                raise ConfigError(f"{KEY}.quant_algo: {algorithm!r} is not read ({', '.join(_MODELOPT)})")
            return cls(method=method, bits=frozenset(_MODELOPT[algorithm]))
        if method != "compressed-tensors":
            raise ConfigError(f"{KEY}.quant_method: {method!r} is not read (compressed-tensors, modelopt)")
        _refuse_more(section)
        groups = section.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ConfigError(f"{KEY}.config_groups: missing; it says how the weights are stored")
        return cls(method=method, bits=frozenset(_bits(name, group) for name, group in groups.items()))

    def __str__(self) -> str:
        types = " and ".join(f"{kind}{bits}" for kind, bits in sorted(self.bits))
        return f"{types or 'few bits'} ({self.method})"

    def check(self, layout: Layout) -> None:
        """Refuses weights of a type that no group speaks of.

        Raises:
            ConfigError: a file and its `config.json` do not belong together.
        """
        kind = ("int" if layout.name in (PACK, INT) else "float", layout.stored_bits)
        if self.bits and kind not in self.bits:
            said = ", ".join(f"{name}{bits}" for name, bits in sorted(self.bits))
            raise ConfigError(f"{KEY}.config_groups: says {said}, the weights are {kind[0]}{kind[1]}")


def write(layouts: dict[str, Layout]) -> dict[str, Any]:
    """The section for weights in these layouts, by kind; kinds that are not named are kept.

    The experts' scheme, or that of the next kind, goes to all `Linear` modules, which is what others look for first;
    kinds with another one are named before it.
    """
    linear = next((layout for kind, layout in layouts.items() if kind != "embedding"), None)
    named: dict[Layout, list[str]] = {}
    for kind, layout in layouts.items():
        if layout != linear:
            named.setdefault(layout, []).append(_TARGETS[kind])
    schemes = [_group(layout, targets) for layout, targets in named.items()]
    if linear is not None:
        schemes.append(_group(linear, ["Linear"]))
    formats = {scheme["format"] for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {f"group_{number}": scheme for number, scheme in enumerate(schemes)},
        "ignore": _IGNORED + [target for kind, target in _TARGETS.items() if kind not in layouts],
    }


def _group(layout: Layout, targets: list[str]) -> dict[str, Any]:
    kind = "float" if layout.name == FLOAT else "int"
    weights = _values(kind, layout.stored_bits, "group" if layout.group else "channel", False)
    # Where weights have 8 bits, others multiply in 8 bits, with inputs rounded token by token.
    inputs = _values(kind, 8, "token", True) if layout.name in (INT, FLOAT) else None
    return {
        "targets": targets,
        "weights": weights | {"group_size": layout.group},
        "input_activations": inputs,
        "output_activations": None,
        "format": layout.name,
    }


def _values(kind: str, bits: int, strategy: str, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "dynamic": dynamic,
    }


def _refuse_more(section: dict[str, Any]) -> None:
    """Refuses what would make the weights mean something else."""
    formats = {section.get("format")} | {
        group.get("format") for group in (section.get("config_groups") or {}).values() if isinstance(group, dict)
    }
    for name in formats - {None}:
        if name not in _READ:
            raise ConfigError(f"{KEY}.format: {name!r} is not read ({', '.join(_READ)})")
    if section.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        raise ConfigError(f"{KEY}.quantization_status: {section['quantization_status']!r} is not compressed")
    for key in ("transform_config", "sparsity_config"):
        value = section.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise ConfigError(f"{KEY}.{key}: is not supported; the weights would need undoing it")


def _bits(name: str, group: Any) -> tuple[str, int]:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or not isinstance(weights.get("num_bits"), int):
        raise ConfigError(f"{KEY}.config_groups.{name}.weights.num_bits: missing")
    return str(weights.get("type", "int")), weights["num_bits"]
