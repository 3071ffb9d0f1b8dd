from maca_serve.doctor.layouts import Scheme
from maca_serve.doctor.straddling import torn_words


def entry(shape, partition, outs=None):
    return {"layer": "x", "shape": shape, "partition": partition, "outs": outs or [shape[0]]}


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
