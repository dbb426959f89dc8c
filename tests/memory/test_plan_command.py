"""`tightfit plan`: one plan, all of them, for machines and as a picture; what it says of what does not fit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from helpers import make_project

import core
from core.cli import main
from core.hookspecs import GIB
from core.memory import simulate
from core.memory.outlook import SIZES
from core.memory.tape import KINDS
from core.model_config import PRESETS
from core.project import Project

REPO = Path(core.__file__).parents[1]
PROFILES = sorted(path.stem for path in (REPO / "plugins" / "hardware").glob("*.py"))
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
MICRO = {"preset": "micro", "block_size": None, **dict.fromkeys(SIZES)}
CARD = {"profile": "rtx2050"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A small model on a card that this machine need not have; also the current folder."""
    made = make_project(tmp_path, hardware=CARD, model=MODEL, train={"batch_tokens": 1024})
    shutil.copytree(REPO / "plugins", made.plugins, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def one_tape(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is taken for that of the small model, so that many questions cost one simulation."""
    tapes: list[Any] = []
    real = simulate.tape_of

    def tape_of(plan: Any, params: Any) -> Any:
        small = replace(plan.model, n_layer=2, n_embd=32, n_head=2, n_kv_head=2, n_inner=64, vocab_size=512)
        if not tapes:
            tapes.append(real(replace(plan, model=small), params))
        return tapes[0]

    monkeypatch.setattr(simulate, "tape_of", tape_of)


def tightfit(*args: str) -> Result:
    return CliRunner().invoke(main, ["plan", *args])


def asked(*args: str) -> dict[str, Any]:
    result = tightfit(*args, "--json")
    assert result.exit_code in (0, 2), result.output
    return json.loads(result.stdout)


# ---- one plan


def test_what_it_prints(project: Project) -> None:
    result = tightfit()
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert "on rtx2050, cuda, bf16 on" in shown and ": fits" in shown
    assert "1,024 tokens: micro-batch 16 x 1 accumulation steps" in shown
    for kind in KINDS:
        assert re.search(rf"^{kind} +\d+\.\d\d$", shown, re.M), kind
    for name in ("in use", "allocated", "reserved", "needed"):
        assert re.search(rf"^{name} +\d+\.\d\d  \S", shown, re.M), name
    assert re.search(r"^nothing added +\d\.\d\d +- +16 +[\d,]+$", shown, re.M)
    assert re.search(
        r"^speed +[\d,]+ to [\d,]+ tokens/s, from bandwidth and FLOP/s of the profile$", shown, re.M
    )
    assert "8,192 tokens in " in shown


def test_json_says_the_same(project: Project) -> None:
    found = asked()
    assert found["fits"] and found["profile"] == "rtx2050" and not found["changed"] and not found["would_fit"]
    assert found["micro_batch"] * found["gradient_accumulation_steps"] * 64 == found["batch_tokens"] == 1024
    assert found["allocated"] <= found["needed"] <= found["reserved"] <= found["usable"] < found["budget"]
    assert sum(found["parts"].values()) <= found["allocated"] and sorted(found["parts"]) == sorted(KINDS)
    worst, best = found["tokens_per_second"]
    assert 0 < worst < best
    assert found["run"] == {
        "tokens": [8192, 8192],
        "seconds": [pytest.approx(8192 / best), pytest.approx(8192 / worst)],
    }
    assert found["ladder"][0]["strategy"] == "" and found["plan"]["profile"]["name"] == "rtx2050"


def test_the_second_answer_is_the_first_and_needs_no_torch(project: Project) -> None:
    code = "import sys; from core.cli import main; main({}, standalone_mode=False); print('torch' in sys.modules)"

    def ask(*args: str) -> list[str]:
        command = [sys.executable, "-c", code.format(["plan", *args])]
        done = subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    first, second = ask(), ask()
    assert first[-1] == "True" and second[-1] == "False"
    assert first[:-1] == second[:-1]
    assert ask("--help")[-1] != "True"


def test_systems_differ_in_what_is_free(project: Project) -> None:
    linux, windows = asked("--os", "linux"), asked("--os", "windows")
    assert windows["os"] == "windows" and windows["budget"] < linux["budget"]
    assert "desktop on windows" in tightfit("--os", "windows").stdout


def test_the_cpu_is_measured_once(project: Project) -> None:
    first = asked("--profile", "cpu")
    worst, best = first["tokens_per_second"]
    assert 0 < worst < best
    rates = json.loads((project.reports / "rates.json").read_text(encoding="utf-8"))["rates"]
    assert list(rates) == [first["plan"]["recipe"]["dtype"]]
    assert asked("--profile", "cpu") == first
    for damaged in ("[]", "{}", '{"machine": 1}'):
        (project.reports / "rates.json").write_text(damaged, encoding="utf-8")
        assert asked("--profile", "cpu")["tokens_per_second"]
    assert "measured here" in tightfit("--profile", "cpu").stdout
    assert tightfit("--profile", "cpu", "--os", "windows").exit_code == 2


def test_a_context_beyond_what_params_allow(project: Project) -> None:
    result = tightfit("--context", "1000000")
    assert result.exit_code == 2 and "131072" in result.output


def test_minutes_become_tokens(project: Project) -> None:
    make_project(project.root, hardware=CARD, model=MODEL, train={"max_minutes": 2.0, "batch_tokens": 1024})
    found = asked()
    low, high = found["run"]["tokens"]
    assert [low, high] == [int(rate * 120) for rate in found["tokens_per_second"]]
    assert found["run"]["seconds"] == [120, 120]


# ---- what a question changes


def test_a_preset_is_taken_as_it_is(project: Project, one_tape: None) -> None:
    make_project(project.root, hardware=CARD, model=MODEL, train={"batch_tokens": 1000, "micro_batch": 5})
    found = asked("--preset", "nano", "--vocab-size", "50257")
    sizes = found["plan"]["recipe"]["model"]
    assert (sizes["n_layer"], sizes["n_embd"], sizes["block_size"]) == (4, 192, 256)
    assert sizes["vocab_size"] == 50304
    dropped, micro_batch, batch = found["changed"]
    assert "n_layer: 2, n_head: 2, n_embd: 32, block_size: 64 are not used" in dropped
    assert "train.micro_batch: 5" in micro_batch
    assert "1000 is not a multiple of the context of 256 tokens; planned with 1024" in batch
    shown = tightfit("--preset", "nano", "--vocab-size", "50257").stdout
    assert all(f"note         {note}" in shown for note in found["changed"])
    assert asked("--preset", "nano", "--context", "100")["batch_tokens"] == 1000
    assert asked("--preset", "nano", "--batch-tokens", "4096")["batch_tokens"] == 4096


def test_the_projects_own_batch_is_not_rounded(project: Project) -> None:
    make_project(project.root, hardware=CARD, model=MODEL, train={"batch_tokens": 1000})
    result = tightfit()
    assert result.exit_code == 2 and "train.batch_tokens: 1000 is not a multiple" in result.output


def test_a_limit_for_ones_own_card_is_not_for_others(project: Project) -> None:
    make_project(project.root, hardware={"memory_gib": 0.5}, model=MODEL, train={"batch_tokens": 1024})
    found = asked("--profile", "rtx2050")
    assert found["budget"] > 3 * GIB and "hardware.memory_gib: 0.5" in found["changed"][0]


@pytest.mark.parametrize(
    ("args", "exit_code", "near"),
    [
        (("--profile", "rtx-2050"), 3, "rtx2050"),
        (("--preset", "124"), 2, "124m"),
        (("--all", "--preset", "124"), 2, "124m"),
        (("--all", "--profile", "rtx309"), 3, "rtx3090"),
    ],
)
def test_unknown_names(project: Project, args: tuple[str, ...], exit_code: int, near: str) -> None:
    result = tightfit(*args)
    assert result.exit_code == exit_code and f"Did you mean '{near}'?" in result.output
    assert "Traceback" not in result.output


def test_outside_of_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = tightfit()
    assert result.exit_code == 2 and "no params.yaml" in result.output


# ---- all plans


def test_every_profile_with_every_preset(project: Project, one_tape: None) -> None:
    result = tightfit("--all", "--svg", "all.svg")
    assert result.exit_code == 0, result.output
    cells = [tuple(line.split()[:3]) for line in result.stdout.splitlines()]
    for preset in PRESETS:
        for profile in PROFILES:
            assert (preset, profile, "yes") in cells
    drawn = (project.root / "all.svg").read_text(encoding="utf-8")
    assert all(f"{profile}, by preset" in drawn for profile in PROFILES)


def test_some_of_all_and_what_cannot_be_planned(project: Project, one_tape: None) -> None:
    strategies = {"add": ["threads"]}
    make_project(project.root, hardware={"strategies": strategies}, model=MODEL, train={"batch_tokens": 1024})
    table = asked("--all", "--preset", "nano")
    assert [(row["preset"], row["profile"]) for row in table] == [("nano", profile) for profile in PROFILES]
    errors = {row["profile"]: row["error"] for row in table if "error" in row}
    assert "threads" in errors["rtx2050"] and "cpu" not in errors
    result = tightfit("--all", "--preset", "nano", "--profile", "rtx2050")
    assert result.exit_code == 0 and re.search(r"^nano +rtx2050 +cannot", result.stdout, re.M)


# ---- what does not fit


def test_what_does_not_fit_names_what_does(project: Project) -> None:
    given: dict[str, Any] = {
        "hardware": {**CARD, "memory_gib": 0.1},
        "model": MICRO,
        "train": {"batch_tokens": 1024},
    }
    make_project(project.root, **given)
    result = tightfit()
    assert result.exit_code == 2 and "does NOT fit" in result.stdout and "speed" not in result.stdout
    assert "checkpointing" in result.stdout and "what would fit: " in result.stderr
    found = asked()
    assert not found["fits"] and found["needed"] > found["usable"] and found["tokens_per_second"] is None
    assert found["would_fit"] == ["hardware.memory_gib: null", "model.preset: nano"]
    assert all(remedy in result.stderr for remedy in found["would_fit"])
    make_project(project.root, **{**given, "model": {**MICRO, "preset": "nano"}})
    assert tightfit().exit_code == 0


# ---- pictures


def test_the_picture_is_valid_and_names_every_kind(project: Project) -> None:
    result = tightfit("--svg", "plan.svg")
    assert result.exit_code == 0 and "wrote plan.svg" in result.stdout
    path = project.root / "plan.svg"
    drawn = path.read_bytes()
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(drawn).iter()]
    for word in (*KINDS, "allocator", "budget"):
        assert any(text.strip() == word for text in texts), word
    assert any("nothing added" in text for text in texts) and any("the plan" in text for text in texts)
    assert tightfit("--svg", "plan.svg", "--json").exit_code == 0
    assert path.read_bytes() == drawn
