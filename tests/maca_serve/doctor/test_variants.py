from maca_serve.doctor.variants import variants

W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}


def compressed(**weights):
    return {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": W4 | weights}}}


def weights(variant):
    return variant["quantization_config"]["config_groups"]["a"]["weights"]


def by_change(quantization, ranks=1):
    return {variant["change"]: variant for variant in variants(quantization, ranks)}


def test_group_sizes_other_than_its_own():
    found = by_change(compressed())
    assert weights(found["quantize with group size 64"])["group_size"] == 64
    assert "quantize with group size 128" not in found
    channel = weights(found["quantize with one scale per channel"])
    assert (channel["group_size"], channel["strategy"]) == (None, "channel")


def test_what_is_asked_about_is_not_changed():
    quantization = compressed()
    variants(quantization, 1)
    assert quantization == compressed()


def test_containers_for_few_bits_only():
    (change,) = [c for c in by_change(compressed(num_bits=3)) if "--container" in c]
    assert weights(by_change(compressed(num_bits=3))[change])["num_bits"] == 4
    assert not any("--container" in change for change in by_change(compressed()))


def test_zero_points():
    assert "quantize without zero points" in by_change(compressed(symmetric=False))
    assert "quantize without zero points" not in by_change(compressed())


def test_fewer_ranks():
    ranks = [variant["tensor_parallel"] for variant in variants(compressed(), 4)]
    assert ranks[:3] == [3, 2, 1]
    assert set(ranks[3:]) == {4}


def test_eight_bits_have_no_groups_to_choose():
    assert not any("group" in change for change in by_change(compressed(num_bits=8)))


def test_methods_without_groups_of_ours():
    assert list(by_change({"quant_method": "fp8"})) == ["serve with `--dtype float16`"]
