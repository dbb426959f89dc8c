"""`tightfit bench devices`: for real on the CPU; the CPU plays the GPUs where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from core.commands import bench
from core.memory import compute

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LARGE", 256)
    monkeypatch.setattr(bench, "LOGGED", 16)
    monkeypatch.setattr(bench, "COPY_MIB", 1)


def test_without_a_gpu_or_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compute, "gpu_problem", lambda: "torch is built without CUDA")
    result = CliRunner().invoke(bench.main, ["devices"])
    assert result.exit_code == 0, result.output
    assert "no GPU here: torch is built without CUDA\n" in result.output
    rows = [line for line in result.output.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 8
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows]
    assert cells[0] == ["what", "measured", "ratio"]
    assert all(c[1].endswith("no GPU here") and c[2] == "-" for c in cells[2:4])
    assert "on the CPU" in cells[4][0] and float(cells[4][2]) > 0
    assert all(c[1:] == ["no GPU here", "-"] for c in cells[5:])
    assert not list(tmp_path.iterdir())


def test_every_row_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    rows = bench.measure([CPU, CPU])
    assert [r.what.split(": ")[1] for r in rows] == [
        "CPU / GPU",
        "CPU / GPU",
        "log each / log at the end",
        "log each / log at the end",
        "pageable / pinned",
        "one GPU / two GPUs",
    ]
    for row in rows:
        assert row.ratio and row.measured.count(" ms") == 2


def test_with_one_gpu_there_are_not_two() -> None:
    assert bench.two_gpus([CPU]).measured == "one GPU only"
    assert bench.two_gpus([]).measured == "no GPU here"


def test_waits_for_every_gpu_before_each_start_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(device.index))
    gpus = [torch.device("cuda", i) for i in range(2)]
    bench.seconds(lambda: calls.append("run"), *gpus, CPU, repeats=2)
    assert calls == ["run", 0, 1, "run", 0, 1, 0, 1, "run", 0, 1]


def test_ratio_is_first_over_second() -> None:
    row = bench._compare("a / b", 0.5, 0.002)
    assert row.ratio == 250 and row.measured == "500 ms / 2 ms"
    assert bench.table([row]).splitlines()[-1] == "| a / b | 500 ms / 2 ms | 250   |"


def test_help_lists_it() -> None:
    result = CliRunner().invoke(bench.main, ["--help"])
    assert result.exit_code == 0 and "devices" in result.output
