"""Memory limits of containers, in folders that look like theirs."""

import os

import pytest

from maca_llmc.common import memory

GIB = 1024**3


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Makes control groups: what /proc says, and files by path."""
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    monkeypatch.setattr(memory, "MOUNT", tmp_path / "mount")

    def make(own, **files):
        (tmp_path / "own").write_text(own)
        for group, content in files.items():
            folder = tmp_path / "mount" / group.replace("__", "/").strip("/")
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in content.items():
                (folder / name).write_text(f"{text}\n")

    return make


def group(limit, used, cache=0, high="max"):
    stat = f"anon 5\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\nshmem 7"
    return {
        "memory.max": limit,
        "memory.high": high,
        "memory.current": used,
        "memory.stat": stat,
    }


def old_group(limit, used, cache=0):
    stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {cache}\ntotal_active_file 0"
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": used,
        "memory.stat": stat,
    }


def test_page_cache_is_not_in_use(container, monkeypatch):
    container("0::/\n", __=group(24 * GIB, 24 * GIB - 5, 23 * GIB))
    assert memory.memory_limits() == [(24 * GIB, GIB - 5)]
    container("0::/\n", __=group(3 * GIB, 2 * GIB, GIB))
    assert memory.available_memory() == 2 * GIB
    assert memory.total_memory() == 3 * GIB


def test_every_group_above_limits_too(container):
    container(
        "0::/system.slice/maca.service\n",
        __=group("max", 9 * GIB),
        system__slice={},
    )
    assert memory.memory_limits() == []
    container(
        "1:cpu,cpuacct:/x\n0::/slice/unit\n",
        __slice=group(8 * GIB, 5 * GIB),
        __slice__unit=group("max", 4 * GIB, 0, high=6 * GIB),
    )
    assert memory.memory_limits() == [(6 * GIB, 4 * GIB), (8 * GIB, 5 * GIB)]


def test_the_first_version_of_control_groups(container):
    # Docker without a namespace of groups: /proc names the host's path, the mount is the container.
    container("4:memory:/docker/ab\n0::/\n", __memory=old_group(24 * GIB, 24 * GIB, 23 * GIB))
    assert memory.memory_limits() == [(24 * GIB, GIB)]


def test_no_limit(container):
    container("4:memory:/a\n", __memory__a=old_group(9223372036854771712, GIB))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory.total_memory() == whole
    assert memory.available_memory() > 0


def test_used_up(container):
    container("0::/\n", __=group(GIB, 2 * GIB))
    assert memory.available_memory() == 0
