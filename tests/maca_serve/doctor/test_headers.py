import json
import struct

import pytest
from maca_serve.common.errors import UserError
from maca_serve.doctor.headers import INDEX, read_headers, read_integers


def write(path, tensors, cut=0):
    """A safetensors file of (dtype, shape, bytes) by name."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + data
    path.write_bytes(content[: len(content) - cut])


SHAPE = ("I64", [2], struct.pack("<2q", 576, 1536))
CODES = ("I32", [2, 3], bytes(24))


def test_names_types_shapes_and_small_values(tmp_path):
    write(tmp_path / "model.safetensors", {"a.codes": CODES, "a.shape": SHAPE})
    tensors = read_headers(tmp_path)
    assert tensors["a.codes"].dtype == "I32"
    assert tensors["a.codes"].shape == (2, 3)
    assert read_integers(tensors["a.shape"]) == (576, 1536)


@pytest.mark.parametrize(
    ("dtype", "size"), [("BF16", 2), ("F8_E4M3", 1), ("F8_E8M0", 1), ("BOOL", 1), ("F64", 8)]
)
def test_types(tmp_path, dtype, size):
    write(tmp_path / "model.safetensors", {"a": (dtype, [4], bytes(4 * size))})
    assert read_headers(tmp_path)["a"].dtype == dtype


def test_weights_that_are_no_codes_take_what_the_engine_computes_in(tmp_path):
    data = {
        "a.weight": ("F32", [4], bytes(16)),
        "b.weight": ("BF16", [4], bytes(8)),
        "c.weight": ("I8", [4], bytes(4)),
        "c.weight_scale": ("F32", [4], bytes(16)),
    }
    write(tmp_path / "model.safetensors", data)
    tensors = read_headers(tmp_path).values()
    assert [tensor.loaded_bytes() for tensor in tensors] == [8, 8, 4, 16]
    assert [tensor.loaded_bytes("float32") for tensor in tensors] == [16, 16, 4, 16]


def test_four_bit_floats_take_half_a_byte(tmp_path):
    write(tmp_path / "model.safetensors", {"a": ("F4", [4], bytes(2))})
    assert read_headers(tmp_path)["a"].shape == (4,)


def test_only_what_the_index_names_is_read(tmp_path):
    write(tmp_path / "one.safetensors", {"a": CODES})
    write(tmp_path / "old.safetensors", {"b": CODES})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert set(read_headers(tmp_path)) == {"a"}


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "two.safetensors"}, r"two\.safetensors: missing.*download"),
        ({"a": "../one.safetensors"}, "not a file of this folder"),
        ({"b": "one.safetensors"}, r"says that b is in one\.safetensors, and it is not"),
        (3, "no readable weight_map"),
    ],
)
def test_indices_that_lie(tmp_path, weight_map, says):
    write(tmp_path / "one.safetensors", {"a": CODES})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=says):
        read_headers(tmp_path)


def test_cut_short(tmp_path):
    write(tmp_path / "model.safetensors", {"a": CODES}, cut=1)
    with pytest.raises(UserError, match="cut short: download or make it again"):
        read_headers(tmp_path)


@pytest.mark.parametrize("content", [b"", b"0" * 1000, struct.pack("<Q", 2) + b"[]"])
def test_files_that_are_none(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a safetensors file"):
        read_headers(tmp_path)


def test_shape_and_bytes_that_disagree(tmp_path):
    write(tmp_path / "model.safetensors", {"a": ("I32", [2, 4], bytes(24))})
    with pytest.raises(UserError, match=r"a takes 24 bytes for I32 \[2, 4\]"):
        read_headers(tmp_path)


def test_one_tensor_twice(tmp_path):
    write(tmp_path / "one.safetensors", {"a": CODES})
    write(tmp_path / "two.safetensors", {"a": CODES})
    with pytest.raises(UserError, match=r"two\.safetensors: holds a, as one\.safetensors"):
        read_headers(tmp_path)


def test_no_safetensors(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        read_headers(tmp_path)
