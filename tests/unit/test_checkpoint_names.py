"""Names on disk and in the network."""

from __future__ import annotations

import pytest
from checkpoint_fixtures import config_dict

from dgemma.checkpoint.load import empty_network
from dgemma.checkpoint.names import Kind, Place, classify, disk_name, module_names, network_name, place, tied_source
from dgemma.config import ModelConfig


def test_every_tensor_of_the_network_has_a_name_on_disk_and_back():
    names = list(empty_network(ModelConfig.from_dict(config_dict())).state_dict())
    on_disk = [disk_name(name) for name in names]
    assert len(set(on_disk)) == len(names)
    assert [network_name(name) for name in on_disk] == names
    assert {classify(name) for name in on_disk} == {Kind.OWN}


def test_the_two_scalars_of_a_layer_are_told_apart():
    assert network_name("model.decoder.layers.3.layer_scalar") == "layers.3.denoise_scalar"
    assert network_name("model.encoder.language_model.layers.3.layer_scalar") == "layers.3.encode_scalar"
    assert tied_source("model.encoder.language_model.layers.3.layer_scalar") is None


@pytest.mark.parametrize(
    ("copy", "source"),
    [
        ("lm_head.weight", "model.decoder.embed_tokens.weight"),
        ("model.encoder.language_model.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
        ("model.encoder.language_model.norm.weight", "model.decoder.norm.weight"),
        (
            "model.encoder.language_model.layers.12.experts.gate_up_proj",
            "model.decoder.layers.12.experts.gate_up_proj",
        ),
    ],
)
def test_tied_copies(copy: str, source: str):
    assert classify(copy) is Kind.TIED
    assert tied_source(copy) == source
    assert classify(source) is Kind.OWN


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.weight", Kind.VISION),
        ("model.encoder.embed_vision.embedding_projection.weight", Kind.VISION),
        ("model.decoder.layers.0.experts.7.up_proj.weight", Kind.OWN),
        ("model.decoder.layers.0.experts.07.up_proj.weight", Kind.UNEXPECTED),
        ("model.decoder.layers.0.experts.7.gate_up_proj.weight", Kind.UNEXPECTED),
        ("model.decoder.layers.0.experts.gate_up_proj.weight_packed", Kind.UNEXPECTED),
        ("model.decoder.layers.0.mlp.up_proj.weight_packed", Kind.OWN),
        ("model.decoder.layers.0.mlp.up_proj.weight_g_idx", Kind.UNEXPECTED),
        ("model.decoder.layers.0.mlp.up_proj.input_global_scale", Kind.UNUSED),
        ("model.decoder.layers.0.self_attn.k_proj.k_scale", Kind.UNUSED),
        ("model.decoder.layers.0.self_attn.v_scale", Kind.UNUSED),
        ("model.decoder.norm.weight_scale", Kind.UNEXPECTED),
        ("model.decoder.layers.0.layer_scalar.weight_scale", Kind.UNEXPECTED),
        ("model.decoder.self_conditioning.gate_proj.weight_scale", Kind.OWN),
        ("lm_head.weight_scale", Kind.TIED),
        ("model.encoder.language_model.layers.0.experts.3.down_proj.weight_packed", Kind.TIED),
        ("model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.weight_scale", Kind.VISION),
        ("model.decoder.layers.01.input_layernorm.weight", Kind.UNEXPECTED),
        ("model.decoder.layers.0.self_attn.q_proj.bias", Kind.UNEXPECTED),
        ("model.encoder.language_model.self_conditioning.pre_norm.weight", Kind.UNEXPECTED),
        ("model.encoder.language_model.layers.0.rotary.inv_freq", Kind.UNEXPECTED),
        ("model.language_model.norm.weight", Kind.UNEXPECTED),
        ("model.decoder.", Kind.UNEXPECTED),
        ("", Kind.UNEXPECTED),
    ],
)
def test_other_names(name: str, kind: Kind):
    assert classify(name) is kind


def test_experts_that_are_stored_one_by_one():
    """Every matrix of every expert has a place in the fused weight, and a name back."""
    layer = "model.decoder.layers.3.experts"
    found = place(f"{layer}.7.up_proj.weight_packed")
    assert found == Place(
        weight="layers.3.experts.gate_up_proj", module=f"{layer}.7.up_proj", part="weight_packed", expert=7, up=True
    )
    for weight in ("layers.3.experts.gate_up_proj", "layers.3.experts.down_proj"):
        for number, module in enumerate(module_names(weight, 11)):
            back = place(f"{module}.weight")
            assert back is not None
            assert (back.weight, back.expert, back.up) == (weight, 11, number == 1)
    assert module_names("layers.3.mlp.up_proj.weight") == ("model.decoder.layers.3.mlp.up_proj",)
