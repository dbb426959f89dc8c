"""One lab for all rehearsals of a test run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.selftest.lab import Lab

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab.open(tmp_path_factory.mktemp("faults"), REPO / "plugins") as lab:
        yield lab
