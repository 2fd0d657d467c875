"""Pipelines are loaded once a session; folders of tiny families are built under one temporary root."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Bits are compared: one thread keeps the order of every sum.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from families import folder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def families_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def family_folder(families_root):
    return lambda name: folder(name, families_root)
