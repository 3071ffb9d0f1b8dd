import json
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from maca_serve import repack
from maca_serve.common.errors import UserError
from maca_serve.doctor.checks import check
from maca_serve.doctor.headers import read_headers
from maca_serve.doctor.schemes import scheme_finder
from maca_serve.formats import repacking
from maca_serve.formats.checkpoint import open_checkpoint
from maca_serve.formats.dequantization import dequantize
from packed import LINEARS, quantization, weights_config, write_packed
from safetensors.torch import load_file

MAIN = [sys.executable, "-c", "from maca_serve.cli import main; main()"]


def read(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def weights(folder):
    """Dequantized weights by module, as we read them."""
    find = scheme_finder(read_config(folder)["quantization_config"])
    tensors = read(folder)
    found = {}
    for name in tensors:
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            start = len(module) + 1
            parts = {n[start:]: t for n, t in tensors.items() if n.startswith(module + ".")}
            found[module] = dequantize(parts, find(module), tuple(parts["weight_shape"].tolist()))
    return found


def weight_of_4_bits(tensors, module):
    """The same by compressed-tensors' own unpacker, which reads 4 bits rightly."""
    part = {s: tensors.get(f"{module}.weight_{s}") for s in ("packed", "scale", "zero_point")}
    out, width = tensors[f"{module}.weight_shape"].tolist()
    scale = part["scale"].repeat_interleave(width // part["scale"].shape[1], 1)
    codes = unpack_from_int32(part["packed"], 4, (out, width)).long()
    if part["zero_point"] is not None:
        shape = (out, part["scale"].shape[1])
        zero = unpack_from_int32(part["zero_point"], 4, shape, packed_dim=0).long()
        codes = codes - zero.repeat_interleave(width // shape[1], 1)
    return codes.bfloat16() * scale


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [8, None])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_values_are_the_same_bit_for_bit(tmp_path, bits, symmetric, group, shards):
    source, target = tmp_path / "w", tmp_path / "w-in-4"
    values = write_packed(source, bits, symmetric=symmetric, group=group, shards=shards)
    result = repack(source, target)
    assert result["modules"] == len(values) == 2 * len(LINEARS)
    assert result["size_bytes"] == open_checkpoint(target).size_bytes
    before, after, tensors = weights(source), weights(target), read(target)
    for module, value in values.items():
        for found in (before[module], after[module], weight_of_4_bits(tensors, module)):
            assert torch.equal(found.view(torch.int16), value.view(torch.int16)), module
    group_0 = read_config(target)["quantization_config"]["config_groups"]["group_0"]
    assert group_0["weights"]["num_bits"] == 4
    headers = read_headers(target)  # the index, where there is one, agrees with the files
    assert check(headers, read_config(target)["quantization_config"]).problems == []
    untouched = [n for n in tensors if not n.endswith(("weight_packed", "weight_zero_point"))]
    assert all(torch.equal(tensors[n], t) for n, t in read(source).items() if n in untouched)


def test_the_index_counts_the_new_bytes(tmp_path):
    write_packed(tmp_path / "w", 3, shards=2)
    repack(tmp_path / "w", tmp_path / "o")
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in read(tmp_path / "o").values())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(read(tmp_path / "w"))


def test_other_files_are_copied_and_the_record_says_what_it_is_now(tmp_path):
    source, target = tmp_path / "w3", tmp_path / "deep" / "o"
    write_packed(source, 3)
    (source / "recipe.yaml").write_text("bits: 3")
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# w3\n")
    (source / "model.safetensors").chmod(0o644)
    (source / "extra").mkdir()
    (source / "extra" / "notes").write_text("x")
    record = {"scheme": "W3A16 int, group 8, symmetric", "container_bits": None, "seed": 7}
    (source / "maca_run.json").write_text(json.dumps(record))
    repack(source, target)
    assert (target / "recipe.yaml").read_text() == "bits: 3"
    head, note, card = (target / "README.md").read_text().split("\n\n")
    assert (head, card) == ("---\nlicense: mit\n---", "# w3\n")
    assert note.startswith("> These are the weights of `w3` in 4-bit containers, the same values")
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert (target / "extra" / "notes").read_text() == "x"
    assert json.loads((target / "maca_run.json").read_text()) == {
        "scheme": "W3A16 int, group 8, symmetric, in 4-bit containers",
        "container_bits": 4,
        "seed": 7,
    }
    assert open_checkpoint(target).scheme == "W3A16 int, group 8, symmetric, in 4-bit containers"
    assert sorted(path.name for path in target.parent.iterdir()) == ["o"]


def test_wider_groups_stay_as_they_are(tmp_path):
    source = tmp_path / "w"
    write_packed(source, 3)
    config = read_config(source)
    # The same folder, were all of its tensors' modules named by the wide group.
    groups = config["quantization_config"]["config_groups"]
    groups["wide"] = {"targets": ["re:.*absent"], "weights": weights_config(8), "format": "x"}
    (source / "config.json").write_text(json.dumps(config))
    repack(source, tmp_path / "o")
    wide = read_config(tmp_path / "o")["quantization_config"]["config_groups"]
    assert wide["wide"] == groups["wide"]
    assert wide["group_0"]["weights"]["num_bits"] == 4


ACTIVATIONS = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, r"w: not quantized \(no quantization_config\): serve it as it is"),
        (
            quantization(weights_config(4)),
            "w: W4A16 int, group 8, symmetric: it has no 2- or 3-bit weights .*serve it as it is",
        ),
        (quantization(weights_config(8)), "W8A16 int.*no 2- or 3-bit weights"),
        (
            quantization(weights_config(8), input_activations=ACTIVATIONS, format="int-quantized"),
            "W8A8 int.*no 2- or 3-bit weights",
        ),
        (
            quantization(weights_config(3), input_activations=ACTIVATIONS),
            "W3A8 int.*quantizes activations too.*without input_activations",
        ),
        (
            quantization(weights_config(3), format="int-quantized"),
            "stored as int-quantized, not as pack-quantized: quantize again",
        ),
        ({"quant_method": "gptq", "bits": 3}, "quant_method is gptq.*--container 4"),
        (quantization(weights_config(2)), "weight_packed is .*: the checkpoint was not written as"),
    ],
)
def test_repack_refuses_in_one_line_what_it_cannot_do(tmp_path, config, says):
    source = tmp_path / "w"
    write_packed(source, 3)
    content = read_config(source) | {"quantization_config": config}
    (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=says) as error:
        repack(source, tmp_path / "o")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_repack_refuses_codes_of_older_packers(tmp_path):
    """Ten 3-bit codes to a word: read as dense they would be other values, and no error."""
    source = tmp_path / "w"
    write_packed(source, 3)
    tensors = read(source)
    name = "model.layers.0.mlp.down_proj.weight_packed"
    repacked = tensors | {name: torch.zeros(80, 11, dtype=torch.int32)}
    repacking.save_file(repacked, source / "model.safetensors")
    with pytest.raises(UserError, match=r"10 codes of 3 bits per word.*10 words packed densely"):
        repack(source, tmp_path / "o")


@pytest.mark.parametrize("shards", [1, 2])
def test_repack_of_a_file_cut_short_is_refused(tmp_path, shards):
    source = tmp_path / "w"
    write_packed(source, 3, shards=shards)
    file = sorted(source.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="it was cut short: download or make it again"):
        repack(source, tmp_path / "o")


def test_outputs_that_exist_or_lie_inside_are_refused(tmp_path):
    source = tmp_path / "w"
    write_packed(source, 3)
    with pytest.raises(UserError, match="w: exists already: remove it or give another OUTPUT"):
        repack(source, source)
    with pytest.raises(UserError, match="lies inside"):
        repack(source, source / "o")
    with pytest.raises(UserError, match="--container: 8 is not supported; give 4"):
        repack(source, tmp_path / "o", container=8)


def test_repack_that_fails_leaves_nothing_and_a_killed_one_is_replaced(tmp_path, monkeypatch):
    source = tmp_path / "w"
    write_packed(source, 3)
    (tmp_path / ".o.partial").mkdir()
    (tmp_path / ".o.partial" / "stale").write_text("x")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(repacking, "save_file", full)
        with pytest.raises(UserError, match=r"No space left on device; free some space"):
            repack(source, tmp_path / "o")
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    (tmp_path / ".o.partial").mkdir()
    (tmp_path / ".o.partial" / "stale").write_text("x")
    repack(source, tmp_path / "o")
    assert not (tmp_path / "o" / "stale").exists()


def test_repack_by_command(tmp_path):
    write_packed(tmp_path / "w", 3)
    command = [*MAIN, "repack", tmp_path / "w", tmp_path / "o", "--container", "4"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path}/o (0.1 MB): 14 modules in 4-bit containers")
    assert "1/1" in done.stderr
