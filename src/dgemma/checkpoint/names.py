"""How tensors are called on disk and in the network, and which of a file's tensors are the network's own.

The two modes share every weight but one scalar a layer, so a checkpoint stores the decoder's tensors once; the
encoder adds its scalars and, for images, the vision tower. Some files also repeat shared tensors under other names.

A weight in few bits is several tensors (`quant/layouts.py`), told apart by the last part of the name: `weight_packed`,
`weight_scale`, ... Tools that quantise take the fused experts apart, so experts come in two spellings: fused
`experts.gate_up_proj` [E, 2I, H], or `experts.7.gate_proj.weight` [I, H], `up_proj`, `down_proj`, expert by expert.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from ..quant import kind_of
from ..quant.layouts import PARTS, WEIGHT

DECODER = "model.decoder."
ENCODER = "model.encoder.language_model."
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
HEAD = "lm_head.weight"

_LAYER_PARTS = frozenset(
    [f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    + [f"mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
    + ["router.proj.weight", "router.scale", "router.per_expert_scale", "experts.gate_up_proj", "experts.down_proj"]
    + ["input_layernorm.weight", "post_attention_layernorm.weight"]
    + ["pre_feedforward_layernorm.weight", "pre_feedforward_layernorm_2.weight"]
    + [f"post_feedforward_layernorm{end}.weight" for end in ("", "_1", "_2")]
)
_SHARED = frozenset(["embed_tokens.weight", "norm.weight"])
_CONDITIONING = frozenset(
    f"self_conditioning.{part}.weight" for part in ("pre_norm", "gate_proj", "up_proj", "down_proj")
)
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]*)\.(.+)")
_EXPERT = re.compile(r"experts\.(0|[1-9][0-9]*)\.(gate|up|down)_proj\.weight")
# Measured for activations and caches in few bits, which are rounded by other rules here.
_UNUSED = re.compile(r"layers\.[0-9]+\..+\.((input|output)_(scale|global_scale|zero_point)|[qkv]_scale)")


class Kind(enum.Enum):
    """What a tensor on disk is to the text network."""

    OWN = "own"
    TIED = "tied copy"
    VISION = "vision"
    UNUSED = "unused"
    UNEXPECTED = "unexpected"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor on disk belongs.

    Fields:
        weight: name in the network's `state_dict`.
        module: name on disk without its last part.
        part: which of the tensors that stand for one matrix (`quant.layouts.PARTS`).
        expert: the expert that the matrix is of, where they are stored one by one.
        up: whether it is the second half of the fused `gate_up_proj`.
    """

    weight: str
    module: str
    part: str = WEIGHT
    expert: int | None = None
    up: bool = False


class VisionIgnored(UserWarning):
    """The checkpoint holds weights for images; they were left on disk, and text works."""


def classify(disk_name: str) -> Kind:
    """What the tensor of that name is. Layer numbers are not checked: the network's size decides about them."""
    if place(disk_name) is not None:
        return Kind.OWN
    if tied_source(disk_name) is not None:
        return Kind.TIED
    if disk_name.startswith(VISION):
        return Kind.VISION
    for prefix in (DECODER, ENCODER):
        if disk_name.startswith(prefix) and _UNUSED.fullmatch(disk_name.removeprefix(prefix)):
            return Kind.UNUSED
    return Kind.UNEXPECTED


def place(disk_name: str) -> Place | None:
    """Where a tensor of the network's own belongs; None for all others."""
    stem, part = _split(disk_name)
    name = network_name(stem)
    module = stem.removesuffix("." + WEIGHT)
    if name is not None:
        rounded = part == WEIGHT or kind_of(name) is not None  # norms are never in few bits
        return Place(weight=name, module=module, part=part) if rounded else None
    layer = _LAYER.fullmatch(stem.removeprefix(DECODER)) if stem.startswith(DECODER) else None
    expert = _EXPERT.fullmatch(layer[2]) if layer else None
    if layer is None or expert is None:
        return None
    fused = "down_proj" if expert[2] == "down" else "gate_up_proj"
    weight = f"layers.{layer[1]}.experts.{fused}"
    return Place(weight=weight, module=module, part=part, expert=int(expert[1]), up=expert[2] == "up")


def network_name(disk_name: str) -> str | None:
    """The name in the network's `state_dict` of a tensor that is a whole weight; None where it isn't one."""
    if disk_name.startswith(ENCODER):
        match = _LAYER.fullmatch(disk_name.removeprefix(ENCODER))
        return f"layers.{match[1]}.encode_scalar" if match and match[2] == "layer_scalar" else None
    if not disk_name.startswith(DECODER):
        return None
    name = disk_name.removeprefix(DECODER)
    match = _LAYER.fullmatch(name)
    if match is None:
        return name if name in _SHARED or name in _CONDITIONING else None
    if match[2] == "layer_scalar":
        return f"layers.{match[1]}.denoise_scalar"
    return name if match[2] in _LAYER_PARTS else None


def disk_name(network_name: str) -> str:
    """The name on disk of a tensor in the network's `state_dict`: the other way round from `network_name`."""
    layer, _, last = network_name.rpartition(".")
    if last == "encode_scalar":
        return f"{ENCODER}{layer}.layer_scalar"
    if last == "denoise_scalar":
        return f"{DECODER}{layer}.layer_scalar"
    return DECODER + network_name


def module_names(weight: str, expert: int | None = None) -> tuple[str, ...]:
    """The modules on disk that hold a weight of the network, in the order of its rows.

    Args:
        expert: of a fused weight of experts, the one whose matrices are meant: two for `gate_up_proj`.
    """
    if expert is None:
        return (disk_name(weight).removesuffix("." + WEIGHT),)
    layer, _, fused = weight.rpartition(".")
    halves = ("down",) if fused == "down_proj" else ("gate", "up")
    return tuple(f"{DECODER}{layer}.{expert}.{half}_proj" for half in halves)


def tied_source(disk_name: str) -> str | None:
    """The decoder's tensor that a tied copy must equal; None where the name is no tied copy's."""
    stem, part = _split(disk_name)
    if stem == HEAD:
        return f"{DECODER}embed_tokens.{part}"
    source = DECODER + disk_name.removeprefix(ENCODER)
    if not disk_name.startswith(ENCODER) or place(source) is None:
        return None
    name = source.removeprefix(DECODER)
    return None if name.endswith("layer_scalar") or name.startswith("self_conditioning.") else source


def _split(disk_name: str) -> tuple[str, str]:
    """A name as that of a plain weight, and its last part: "a.weight_scale" -> ("a.weight", "weight_scale")."""
    stem, _, last = disk_name.rpartition(".")
    return (f"{stem}.{WEIGHT}", last) if last in PARTS else (disk_name, WEIGHT)
