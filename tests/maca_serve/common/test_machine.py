"""What machine this is, by what its tools say."""

import pytest
from maca_serve.common import machine
from maca_serve.common.machine import card_memory, describe_machine

CARDS = """\
#!/bin/sh
case "$1" in
*memory.free*) printf '0, GPU-aa, 80000, 81559\\n1, GPU-bb, 3000, 24576\\n' ;;
*) printf 'NVIDIA H100, 81559 MiB, 9.0\\nNVIDIA A10, 24576 MiB, 8.6\\n' ;;
esac
"""


@pytest.fixture
def says(tmp_path, monkeypatch):
    """Gives this machine an `nvidia-smi`."""

    def says(script):
        program = tmp_path / "nvidia-smi"
        program.write_text(script)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return says


def test_cards_are_described(says, monkeypatch):
    says(CARDS)
    monkeypatch.setattr(machine, "_version", lambda name: "0.32.0")
    gpus = describe_machine()["gpus"]
    assert gpus == ["NVIDIA H100, 81559 MiB, 9.0", "NVIDIA A10, 24576 MiB, 8.6"]
    monkeypatch.setattr(machine, "_version", lambda name: "0.32.0+cpu")
    assert describe_machine()["gpus"] == [], "what runs on the CPU was not measured on a card"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [(80000, 81559), (3000, 24576)]),
        ("1", [(3000, 24576)]),
        ("1,0", [(3000, 24576), (80000, 81559)]),
        ("GPU-bb", [(3000, 24576)]),
        ("", []),
    ],
)
def test_memory_is_of_the_cards_that_may_be_used(says, monkeypatch, visible, expected):
    says(CARDS)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert card_memory() == expected


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/sh\necho 'NVIDIA-SMI has failed: no driver'; exit 9",
        "#!/bin/sh\necho '0, GPU-aa, [N/A], [N/A]'",
    ],
)
def test_what_is_no_number_is_no_memory(says, script):
    says(script)
    assert card_memory() == []
    assert "failed" not in str(describe_machine()["gpus"])
