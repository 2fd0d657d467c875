"""What the store says of its jobs after each kill, and what lies in the folders."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from photogram.engine.frames_folder import SHARED_MEMORY

FINAL = {"completed", "failed", "cancelled"}
# What a second end of a job would change. The file of a failed one is named until it is removed.
END = ("state", "finished_at", "file_bytes", "error_code")


@dataclass
class Rows:
    """Nothing that was in the store may go, and nothing final may change."""

    known: dict[str, sqlite3.Row] = field(default_factory=dict)

    def read(self, data: Path) -> list[sqlite3.Row]:
        """Return all rows in the order of acceptance; fail when one is lost or has ended a second time."""
        path = data / "jobs.sqlite3"
        if not path.exists():
            return []
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.row_factory = sqlite3.Row
            try:
                rows = connection.execute("SELECT * FROM jobs ORDER BY position").fetchall()
            except sqlite3.OperationalError:
                return []  # killed before the tables were made
        now = {row["job_id"]: row for row in rows}
        for job_id, before in self.known.items():
            assert job_id in now, f"{job_id} is lost"
            if before["state"] in FINAL:
                told = (*END, "file_key") if before["state"] == "completed" else END
                ends = [{name: row[name] for name in told} for row in (before, now[job_id])]
                assert ends[0] == ends[1], f"{job_id} has ended twice"
        self.known = now
        return rows


def unfinished(rows: list[sqlite3.Row]) -> str:
    """Return the states of unfinished jobs, as words."""
    states = Counter(row["state"] for row in rows if row["state"] not in FINAL)
    return ", ".join(sorted(states)) or "idle"


def stored_files(data: Path) -> dict[str, Path]:
    return {path.name: path for path in (data / "files").rglob("*") if path.is_file()}


def check_nothing_is_left_over(data: Path, rows: list[sqlite3.Row]) -> None:
    """With every job over and every server gone: a file for each completed row, whole, and nothing else."""
    files = stored_files(data)
    assert set(files) == {row["file_key"] for row in rows if row["state"] == "completed"}
    for row in rows:
        assert row["state"] in FINAL
        if row["state"] == "completed":
            assert row["file_bytes"] == files[row["file_key"]].stat().st_size
    inputs = data / "inputs"
    assert not inputs.exists() or list(inputs.iterdir()) == []
    alive = [f"-{os.getuid()}-{pid}-" for pid in psutil.pids()]
    frames = [path.name for path in SHARED_MEMORY.glob(f"photogram-{os.getuid()}-*")]
    assert [name for name in frames if not any(mark in name for mark in alive)] == []
