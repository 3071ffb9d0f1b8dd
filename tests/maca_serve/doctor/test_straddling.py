from types import SimpleNamespace

from maca_serve.doctor.building import Linear
from maca_serve.doctor.fusing import Layer
from maca_serve.doctor.layouts import Scheme
from maca_serve.doctor.straddling import torn_words


def entry(shape, partition, outs=None):
    return {"layer": "x", "shape": shape, "partition": partition, "outs": outs or [partition[0]]}


def test_rows_cut_inside_a_word():
    three = Scheme("pack-quantized", 3, 16)
    problem = torn_words(entry([64, 96], [64, 48]), three)
    assert "48 input features of a rank x 3 bits" in problem.what
    assert torn_words(entry([64, 192], [64, 96]), three) is None
    assert torn_words(entry([64, 48], [64, 48]), three) is None, "nothing is cut"


def test_zero_points_are_packed_along_outputs():
    asymmetric = Scheme("pack-quantized", 4, 32, symmetric=False)
    fused = entry([40, 64], [40, 64], outs=[20, 20])
    assert "20 output features of a part on a rank x 4 bits" in torn_words(fused, asymmetric).what
    assert torn_words(fused, Scheme("pack-quantized", 4, 32)) is None


def test_awq_packs_codes_along_outputs():
    assert torn_words(entry([24, 64], [12, 64]), Scheme("awq", 4, 32)) is not None
    assert torn_words(entry([32, 64], [16, 64]), Scheme("awq", 4, 32)) is None


def test_other_formats_have_no_words():
    assert torn_words(entry([10, 10], [10, 5]), Scheme("int-quantized", 8)) is None


def test_parts_that_are_repeated_and_not_cut():
    """Gemma 3 270M on two ranks: 4 query heads of 256 are shared, the one key head is repeated."""
    parts = ("q_proj", "k_proj", "v_proj")
    layer = Layer("qkv_proj", "QKVParallelLinear", parts, (1024, 256, 256), 640)
    sizes = {"output_size_per_partition": 1024, "input_size_per_partition": 640}
    built = SimpleNamespace(output_partition_sizes=[512, 256, 256], **sizes)
    described = Linear(layer, {}, ranks=2).describe(built)
    assert described["shape"] == [1536, 640] and described["partition"] == [1024, 640]
    assert torn_words(described, Scheme("pack-quantized", 4, 32, symmetric=False)) is None
