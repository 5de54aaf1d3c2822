"""Loading is strict: what is wrong with a file is said in one line that names the tensor and the file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixtures import EMBEDDING, GATE, NORM, Checkpoint, config_dict, refused, release_dict, shard_name
from safetensors.torch import save_file

from dgemma.checkpoint import VisionIgnored, load_network
from dgemma.checkpoint.load import empty_network
from dgemma.checkpoint.names import disk_name
from dgemma.config import ModelConfig
from dgemma.errors import ConfigError
from dgemma.model import Network

SECRET = "model.encoder.language_model."


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "model")


def load(checkpoint: Checkpoint, **options: Any) -> Network:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_network(checkpoint.directory, checkpoint.config, **options)


def assert_loaded(network: Network, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    state = network.state_dict()
    assert {disk_name(name) for name in state} == set(tensors)
    for name, tensor in state.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[disk_name(name)].to(dtype)), name


def test_one_file_shards_and_another_name_all_load(checkpoint: Checkpoint):
    assert_loaded(load(checkpoint.write()), checkpoint.tensors)
    checkpoint.file.rename(checkpoint.directory / "weights.safetensors")
    assert_loaded(load(checkpoint), checkpoint.tensors)
    (checkpoint.directory / "weights.safetensors").unlink()
    assert_loaded(load(checkpoint.write_shards()), checkpoint.tensors)


def test_the_loaded_network_runs(checkpoint: Checkpoint):
    network = load(checkpoint.write())
    cache = network.new_cache(batch=1)
    hidden = network.encode(torch.tensor([[2, 5, 7]]), cache)
    assert bool(torch.isfinite(network.logits(hidden)).all())


def test_dtype_is_the_callers_or_the_configurations(checkpoint: Checkpoint):
    checkpoint.write()
    assert_loaded(load(checkpoint, dtype=torch.bfloat16), checkpoint.tensors, torch.bfloat16)
    checkpoint.config = ModelConfig.from_dict(config_dict() | {"dtype": "float16"})
    assert_loaded(load(checkpoint), checkpoint.tensors, torch.float16)
    checkpoint.config = ModelConfig.from_dict(config_dict() | {"dtype": "int8"})
    refused(lambda: load(checkpoint), "dtype", "int8", kind=ConfigError)


def test_parameters_stay_trainable(checkpoint: Checkpoint):
    network = load(checkpoint.write())
    assert {parameter.requires_grad for parameter in network.parameters()} == {
        parameter.requires_grad for parameter in Network(checkpoint.config).parameters()
    }


def test_the_empty_network_is_the_network(checkpoint: Checkpoint):
    empty, real = empty_network(checkpoint.config).state_dict(), Network(checkpoint.config).state_dict()
    assert {name: tensor.shape for name, tensor in empty.items()} == {name: t.shape for name, t in real.items()}
    assert all(tensor.is_meta for tensor in empty.values())


def test_vision_weights_are_left_aside_with_one_warning(checkpoint: Checkpoint):
    own = dict(checkpoint.tensors)
    checkpoint.tensors["model.encoder.vision_tower.patch_embedder.input_proj.weight"] = torch.randn(3, 4)
    checkpoint.tensors["model.encoder.embed_vision.embedding_projection.weight"] = torch.randn(3, 4)
    checkpoint.write()
    with pytest.warns(VisionIgnored, match="left 2 tensors for images") as caught:
        network = load_network(checkpoint.directory, checkpoint.config)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert_loaded(network, own)


def test_tied_copies_that_are_equal_are_accepted(checkpoint: Checkpoint):
    own = dict(checkpoint.tensors)
    checkpoint.tensors["lm_head.weight"] = own[EMBEDDING].clone()
    for name, tensor in own.items():
        if name.startswith("model.decoder.layers.") and not name.endswith("layer_scalar"):
            checkpoint.tensors[name.replace("model.decoder.", SECRET)] = tensor.clone()
    assert_loaded(load(checkpoint.write()), own)
    checkpoint.file.unlink()
    assert_loaded(load(checkpoint.write_shards(4)), own)


@pytest.mark.parametrize("name", ["lm_head.weight", SECRET + "layers.1.mlp.gate_proj.weight", SECRET + "norm.weight"])
def test_tied_copies_that_differ_are_refused(checkpoint: Checkpoint, name: str):
    source = EMBEDDING if name == "lm_head.weight" else name.replace(SECRET, "model.decoder.")
    copy = checkpoint.tensors[source].clone()
    copy.view(-1)[-1] += 1e-3
    checkpoint.tensors[name] = copy
    refused(lambda: load(checkpoint.write()), f"{name} differs", source, str(checkpoint.file))


def test_tied_copies_of_another_type_are_refused(checkpoint: Checkpoint):
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors[EMBEDDING].to(torch.bfloat16)
    refused(lambda: load(checkpoint.write()), "lm_head.weight differs", str(checkpoint.file))


def test_missing_tensor(checkpoint: Checkpoint):
    del checkpoint.tensors[GATE]
    refused(lambda: load(checkpoint.write()), f"{GATE} is missing", str(checkpoint.file))
    checkpoint.file.unlink()
    refused(lambda: load(checkpoint.write_shards(3)), f"{GATE} is missing", str(checkpoint.directory))


def test_missing_encoder_scalar_is_not_taken_from_the_decoder(checkpoint: Checkpoint):
    name = "model.encoder.language_model.layers.0.layer_scalar"
    del checkpoint.tensors[name]
    refused(lambda: load(checkpoint.write()), f"{name} is missing", str(checkpoint.file))


@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.layers.0.self_attn.q_proj.bias",
        "model.decoder.layers.2.input_layernorm.weight",  # one layer too many
        "model.decoder.layers.1.self_attn.v_proj.weight",  # a full layer has none
        "model.encoder.language_model.layers.2.input_layernorm.weight",
        "model.decoder.layers.0.experts.0.gate_proj.weight",
        "something",
    ],
)
def test_unexpected_tensor(checkpoint: Checkpoint, name: str):
    checkpoint.tensors[name] = torch.zeros(16)
    refused(lambda: load(checkpoint.write()), f"{name} is unexpected", str(checkpoint.file))


def test_wrong_shape(checkpoint: Checkpoint):
    checkpoint.tensors[GATE] = checkpoint.tensors[GATE].T.contiguous()
    refused(lambda: load(checkpoint.write()), f"{GATE} has shape [16, 24]", "[24, 16]", str(checkpoint.file))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_wrong_type(checkpoint: Checkpoint, dtype: torch.dtype):
    checkpoint.tensors[GATE] = checkpoint.tensors[GATE].to(dtype)
    refused(lambda: load(checkpoint.write()), f"{GATE} is of type", str(checkpoint.file))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [NORM, "model.decoder.layers.0.layer_scalar"])
def test_norms_and_scalars_are_finite(checkpoint: Checkpoint, name: str, value: float):
    checkpoint.tensors[name][0] = value
    refused(lambda: load(checkpoint.write()), name, "NaN or infinity", str(checkpoint.file))


def test_truncated_file(checkpoint: Checkpoint):
    raw = checkpoint.write().file.read_bytes()
    for size in (0, 5, 8, 100):
        checkpoint.file.write_bytes(raw[:size])
        refused(lambda: load(checkpoint), "truncated", str(checkpoint.file))
    checkpoint.file.write_bytes(raw[:-1])
    refused(lambda: load(checkpoint), "truncated: model.", str(checkpoint.file))
    checkpoint.file.write_bytes(raw + b"more")
    refused(lambda: load(checkpoint), "4 bytes at the end", str(checkpoint.file))


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b"[]",
        b'{"a":1}',
        b'{"a":{"dtype":"F32","shape":[1]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    ],
    ids=lambda header: header[:60].decode(errors="replace"),
)
def test_corrupt_header(checkpoint: Checkpoint, header: bytes):
    checkpoint.file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(lambda: load(checkpoint), "header is corrupt", str(checkpoint.file))


def test_header_of_an_absurd_length_is_not_allocated(checkpoint: Checkpoint):
    checkpoint.file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(lambda: load(checkpoint), "truncated or no safetensors file", str(checkpoint.file))


def test_header_that_moves_a_tensor_is_noticed(checkpoint: Checkpoint):
    checkpoint.write()

    def swap(header: dict[str, Any]) -> None:
        header[GATE]["data_offsets"] = header[EMBEDDING]["data_offsets"]

    checkpoint.edit_header(swap)
    refused(lambda: load(checkpoint), "corrupt", GATE, str(checkpoint.file))


def test_missing_shard(checkpoint: Checkpoint):
    path = checkpoint.write_shards().directory / shard_name(1, 3)
    path.unlink()
    held = next(name for name, file in checkpoint.read_index().items() if file == path.name)
    refused(lambda: load(checkpoint), str(path), held)


def test_index_that_names_a_shard_which_lacks_the_tensor(checkpoint: Checkpoint):
    where = checkpoint.write_shards().read_index()
    assert where[NORM] != shard_name(0, 3)
    checkpoint.write_index(where | {NORM: shard_name(0, 3)})
    refused(lambda: load(checkpoint), f"lacks {NORM}", str(checkpoint.directory / shard_name(0, 3)))


def test_index_that_names_a_tensor_which_nobody_has(checkpoint: Checkpoint):
    where = checkpoint.write_shards().read_index()
    checkpoint.write_index(where | {"ghost": shard_name(2, 3)})
    refused(lambda: load(checkpoint), "lacks ghost", str(checkpoint.directory / shard_name(2, 3)))


def test_same_tensor_in_two_shards(checkpoint: Checkpoint):
    where = checkpoint.write_shards().read_index()
    first = shard_name(0, 3)
    tensors = {name: checkpoint.tensors[name] for name, file in where.items() if file == first}
    save_file(tensors | {NORM: checkpoint.tensors[NORM]}, checkpoint.directory / first)
    refused(lambda: load(checkpoint), NORM, f"is in {first} too", where[NORM])


def test_shard_with_a_tensor_that_the_index_leaves_out(checkpoint: Checkpoint):
    where = checkpoint.write_shards().read_index()
    file = where.pop(NORM)
    checkpoint.write_index(where)
    refused(lambda: load(checkpoint), NORM, str(checkpoint.directory / file))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a\\b.safetensors", "weights.bin", 3])
def test_index_that_points_elsewhere(checkpoint: Checkpoint, file: Any):
    where = checkpoint.write_shards().read_index()
    checkpoint.write_index(where | {NORM: file})
    refused(lambda: load(checkpoint), NORM, "model.safetensors.index.json", repr(file))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000])
def test_index_that_is_damaged(checkpoint: Checkpoint, content: str):
    path = checkpoint.directory / "model.safetensors.index.json"
    path.write_text(content)
    refused(lambda: load(checkpoint), str(path))


def test_both_one_file_and_shards(checkpoint: Checkpoint):
    checkpoint.write().write_shards()
    refused(lambda: load(checkpoint), str(checkpoint.directory), "both")


def test_several_files_without_an_index(checkpoint: Checkpoint):
    checkpoint.write_shards()
    (checkpoint.directory / "model.safetensors.index.json").unlink()
    refused(lambda: load(checkpoint), str(checkpoint.directory), "3 .safetensors files but no")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(checkpoint: Checkpoint, name: str):
    (checkpoint.directory / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/dgemma-was-here'\ntR.")
    refused(lambda: load(checkpoint), str(checkpoint.directory / name), "pickle", "safetensors")
    assert_loaded(load(checkpoint.write()), checkpoint.tensors)


def test_no_weights_and_no_directory(checkpoint: Checkpoint):
    refused(lambda: load(checkpoint), str(checkpoint.directory), "no weights")
    missing = checkpoint.directory / "nowhere"
    refused(lambda: load_network(missing, checkpoint.config), str(missing), "no such directory")


def test_nothing_is_read_before_everything_is_checked(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    import dgemma.checkpoint.load as module

    checkpoint.tensors["something"] = torch.zeros(1)
    checkpoint.write()
    monkeypatch.setattr(module, "read_tensor", lambda *_: pytest.fail("read a tensor"))
    refused(lambda: load(checkpoint), "something")


def test_the_file_may_vanish_after_loading(checkpoint: Checkpoint):
    network = load(checkpoint.write())
    checkpoint.file.write_bytes(b"")  # a mapped file would now kill the process
    assert_loaded(network, checkpoint.tensors)


@pytest.mark.parametrize("spelling", ["release", "transformers"])
def test_the_release_has_its_size(spelling: str):
    config = ModelConfig.from_dict(release_dict(spelling))
    state = empty_network(config).state_dict()
    counted = sum(tensor.numel() for tensor in state.values())
    assert counted == config.total_parameters()
    assert counted == 25_250_986_812  # "25.2 B" on record; with the vision tower, 51.65 GB in bfloat16
    assert config.active_parameters() == 3_840_375_612  # "3.8 B"
    experts = sum(tensor.numel() for name, tensor in state.items() if ".experts." in name)
    assert counted - experts + experts * 8 // 128 == config.active_parameters()
    other = empty_network(ModelConfig.from_dict(release_dict())).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in other.items()}


MEASURE = """
import sys, json
from pathlib import Path
from dgemma.checkpoint import load_network
from dgemma.config import ModelConfig
import torch
torch.set_num_threads(1)

def field(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

directory = Path(sys.argv[1])
config = ModelConfig.read(directory / "config.json")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before = field("VmRSS")
network = load_network(directory, config, dtype=torch.float32)
print(json.dumps({"peak": field("VmHWM") - before, "model": sum(t.nbytes for t in network.state_dict().values())}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures with Linux's /proc")
def test_memory_stays_at_the_model_and_one_tensor(tmp_path: Path):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 8}
    data = config_dict(**sizes, layer_types=["sliding_attention"] * 7 + ["full_attention"])
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(data))
    state = empty_network(ModelConfig.from_dict(data)).state_dict()
    checkpoint.tensors = {disk_name(n): torch.zeros(t.shape, dtype=torch.bfloat16) for n, t in state.items()}
    on_disk = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert on_disk > 100e6
    checkpoint.write_shards(2)
    checkpoint.tensors.clear()
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["model"] == 2 * on_disk
    # A shard is 50 MB: loading one whole, or mapping it, would be seen.
    assert measured["peak"] < measured["model"] + largest + 16e6, measured
