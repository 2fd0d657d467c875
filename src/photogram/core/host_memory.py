"""How much memory the host has, and how much of it this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def total_memory_bytes() -> int:
    """Return the machine's memory, or the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _container_limit_bytes()
    return total if limit is None else min(total, limit)


def available_memory_bytes() -> int:
    """Return the memory that this process may still take: the machine's, or less where a container sets a limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        sizes = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(sizes["MemAvailable"].split()[0]) * 1024
    limit = _container_limit_bytes()
    if limit is not None and _USED.exists():
        available = min(available, max(limit - int(_USED.read_text()), 0))
    return available


def _container_limit_bytes() -> int | None:
    text = _LIMIT.read_text().strip() if _LIMIT.exists() else ""
    return int(text) if text.isdigit() else None
