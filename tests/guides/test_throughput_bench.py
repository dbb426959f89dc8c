"""bench/throughput.py at tiny sizes: Tightfit by itself, and beside nanoGPT where NANOGPT names a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click import ClickException, UsageError

from bench import throughput

REPO = Path(__file__).parents[2]
NANOGPT = os.environ.get("NANOGPT", "")


def quick(peers: str) -> dict[str, list[list[str]]]:
    """{first heading: rows of cells} of the tables that --quick prints, which are parted by an empty line."""
    command = [sys.executable, "-m", "bench.throughput", "--quick", "--peers", peers]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    tables: dict[str, list[list[str]]] = {}
    for block in done.stdout.split("\n\n"):
        rows = [
            [c.strip() for c in line.strip("|").split("|")] for line in block.splitlines() if line[:1] == "|"
        ]
        if rows:
            assert {len(row) for row in rows} == {len(rows[0])}
            tables.setdefault(rows[0][0], []).extend(rows[2:])
    assert "6 N + 12 L T C" in done.stdout and "TFLOP/s" in done.stdout
    return tables


def test_tightfit_by_itself() -> None:
    tables = quick("tightfit")
    assert [row[0] for row in tables["network"]] == ["Tightfit"]
    assert len(tables["training"]) == 2  # a row of each micro-batch
    for label, numbers, speed, ratio, peak, share in tables["training"]:
        assert (label, numbers, ratio) == ("Tightfit, AdamW", "fp32", "-")
        assert float(speed.replace(",", "")) > 0 and 0 < float(peak) < 8 and share.endswith("%")


@pytest.mark.skipif(not (Path(NANOGPT) / "train.py").is_file(), reason="NANOGPT names no checkout of nanoGPT")
def test_beside_nanogpt_the_arithmetic_is_equal() -> None:
    before = sorted(Path(NANOGPT).rglob("*"))
    tables = quick("tightfit,nanogpt")
    assert sorted(Path(NANOGPT).rglob("*")) == before
    ours, theirs = tables["network"]
    total, biases, rows, weights, flops = (float(cell.replace(",", "")) for cell in ours[1:])
    assert [float(cell.replace(",", "")) for cell in theirs[1:]] == [total - biases, 0, rows, weights, flops]
    assert [row[0] for row in tables["training"]] == ["Tightfit, AdamW", "nanoGPT"] * 2
    for row in tables["training"]:
        assert float(row[3]) == 1 if row[0] == "nanoGPT" else float(row[3]) > 0


def found(**changed: Any) -> dict[str, Any]:
    return {"total": 1, "biases": 0, "rows": 64, "rest": 9, "flops": 100, **changed}


def test_unequal_arithmetic_is_refused() -> None:
    throughput.require_equal(
        {"tightfit": found(), "nanogpt": found(biases=3), "litgpt": found(rest=8, flops=90)}, 100
    )
    for wrong in ({"rest": 8}, {"rows": 128}, {"flops": 99}):
        with pytest.raises(ClickException):
            throughput.require_equal({"tightfit": found(), "nanogpt": found(**wrong)}, 100)


def test_without_bf16_instructions_it_is_not_measured() -> None:
    names, why = throughput.chosen("all", "cpu", cpu_bf16=False)
    assert not any(throughput.PEERS[name].bf16 for name in names)
    assert why == [
        f"{label}: not measured: this CPU has no bf16 instructions"
        for label in ("Tightfit, AdamW, bf16", "nanoGPT, bf16")
    ]
    assert throughput.chosen("all", "cpu", cpu_bf16=True) == (throughput.ON["cpu"], [])
    with pytest.raises(UsageError, match="no nanogtp; there are "):
        throughput.chosen("tightfit,nanogtp", "cpu", cpu_bf16=False)


def test_a_ratio_is_of_one_turn() -> None:
    setting = throughput.Setting("cpu", micro_batch=1, steps=2)

    def turns(*seconds: float) -> list[dict[str, Any]]:
        return [{"seconds": [s, s], "peak": 1 << 30, "dtype": "fp32"} for s in seconds]

    done = {
        "tightfit": turns(1.0, 3.0),
        "nanogpt": turns(2.0, 3.0),
        "litgpt": [{"problem": "does not fit"}, {}],
    }
    rows = list(throughput.table_of_speed(done, setting, {"fp32": 256e9}, flops=1e9))[2:]
    assert rows[0] == (
        "| Tightfit, AdamW | fp32 | 171 (85 to 256) | 1.50 (1.00 to 2.00) | 1.00 (1.00 to 1.00) | 67% |"
    )
    assert rows[2] == "| litgpt | - | does not fit | - | - | - |"
