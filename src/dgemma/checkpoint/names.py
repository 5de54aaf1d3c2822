"""How tensors are called on disk and in the network, and which of a file's tensors are the network's own.

The two modes share every weight but one scalar a layer, so a checkpoint stores the decoder's tensors once; the
encoder adds its scalars and, for images, the vision tower. Some files also repeat shared tensors under other names.
"""

from __future__ import annotations

import enum
import re

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


class Kind(enum.Enum):
    """What a tensor on disk is to the text network."""

    OWN = "own"
    TIED = "tied copy"
    VISION = "vision"
    UNEXPECTED = "unexpected"


class VisionIgnored(UserWarning):
    """The checkpoint holds weights for images; they were left on disk, and text works."""


def classify(disk_name: str) -> Kind:
    """What the tensor of that name is. Layer numbers are not checked: the network's size decides about them."""
    if network_name(disk_name) is not None:
        return Kind.OWN
    if tied_source(disk_name) is not None:
        return Kind.TIED
    if disk_name.startswith(VISION):
        return Kind.VISION
    return Kind.UNEXPECTED


def network_name(disk_name: str) -> str | None:
    """The name in the network's `state_dict` of a tensor on disk; None where it isn't the network's own."""
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


def tied_source(disk_name: str) -> str | None:
    """The decoder's tensor that a tied copy must equal; None where the name is no tied copy's."""
    if disk_name == HEAD:
        return f"{DECODER}embed_tokens.weight"
    if not disk_name.startswith(ENCODER):
        return None
    name = disk_name.removeprefix(ENCODER)
    match = _LAYER.fullmatch(name)
    tied = name in _SHARED if match is None else match[2] in _LAYER_PARTS
    return DECODER + name if tied else None
