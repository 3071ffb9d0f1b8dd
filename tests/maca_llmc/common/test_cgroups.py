"""Memory limits of containers; the module is the serve side's, and tested in full there."""

from pathlib import Path

from maca_llmc.common import cgroups, device

GIB = 1024**3


def test_both_sides_read_limits_alike():
    sides = [
        Path(cgroups.__file__),
        Path(__file__).parents[3] / "serve/maca_serve/common/cgroups.py",
    ]
    assert sides[0].read_text() == sides[1].read_text()


def test_a_limit_holds_and_page_cache_is_not_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroups, "MOUNT", tmp_path)
    (tmp_path / "own").write_text("0::/\n")
    for name, value in {"max": 2 * GIB, "current": 2 * GIB}.items():
        (tmp_path / f"memory.{name}").write_text(f"{value}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    assert device.available_memory() == GIB
