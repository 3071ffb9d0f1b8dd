"""What Linux says of the processor."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Its model, or else its kind."""
    return processor_field("model name") or platform.processor() or platform.machine()


def processor_field(name: str) -> str:
    """The first value of a field of /proc/cpuinfo; empty where there is none."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
