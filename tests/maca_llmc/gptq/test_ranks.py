"""What ranks agree on; the rest of it is tested with two of them, in test_distributed."""

from maca_llmc.gptq.ranks import common_partition


def test_what_is_together_on_every_rank():
    ranks = [
        [["q", "k", "v"], ["gate", "up"]],
        [["v", "q"], ["k"], ["up", "gate"], ["down"]],
    ]
    assert common_partition(ranks) == [["down"], ["gate", "up"], ["k"], ["q", "v"]]


def test_modules_missing_on_one_rank_stay_together():
    assert common_partition([[["gate", "up"]], []]) == [["gate", "up"]]
