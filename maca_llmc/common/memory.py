"""Memory that this process may use, within the limits of its container or systemd unit."""

from pathlib import Path

import psutil

OWN = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
# What Linux gives up before it refuses memory, as in MemAvailable: page cache and such.
RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")


def available_memory() -> int:
    """Bytes of the host's memory that can be taken without swapping, within all limits."""
    free: int = psutil.virtual_memory().available
    return max(0, min([free, *(limit - used for limit, used in memory_limits())]))


def total_memory() -> int:
    """Bytes of the host's memory, or of the lowest limit."""
    whole: int = psutil.virtual_memory().total
    return min([whole, *(limit for limit, _ in memory_limits())])


def memory_limits() -> list[tuple[int, int]]:
    """Limit, and bytes that are in use and not reclaimable, of each control group that has one.

    A process has the limits of its own group and of those above. In a container the paths may be
    the host's, and then only the topmost of these is there: it is the container's.
    """
    found = []
    for line in OWN.read_text().splitlines() if OWN.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, read = MOUNT, _read_v2
        elif "memory" in controllers.split(","):
            mount, read = MOUNT / "memory", _read_v1
        else:
            continue
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                found += read(folder)
    return found


def _read_v2(group: Path) -> list[tuple[int, int]]:
    limits = [_number(group / name) for name in ("memory.max", "memory.high")]
    used = _used(group / "memory.current", group / "memory.stat")
    return [(limit, used) for limit in limits if limit is not None and used is not None]


def _read_v1(group: Path) -> list[tuple[int, int]]:
    limit = _number(group / "memory.limit_in_bytes")
    used = _used(group / "memory.usage_in_bytes", group / "memory.stat", "total_")
    return [] if limit is None or used is None else [(limit, used)]


def _used(current: Path, stat: Path, prefix: str = "") -> int | None:
    whole = _number(current)
    if whole is None or not stat.is_file():
        return whole
    counts = dict(line.split(" ", 1) for line in stat.read_text().splitlines())
    return max(0, whole - sum(int(counts.get(prefix + name, 0)) for name in RECLAIMABLE))


def _number(file: Path) -> int | None:
    """What a file holds; None where it is not there, or says `max`."""
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else None
