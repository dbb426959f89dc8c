"""The stage env-check on made-up machines: its report, its outputs, its exit codes, and what it does not import."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from click.testing import CliRunner, Result
from helpers import make_project

import core
from core import env_check
from core.cli import main as tightfit
from core.errors import PluginError
from core.hookspecs import GIB, Facts, Gpu
from core.project import Project
from stages.env_check import main

REPO = Path(core.__file__).parents[1]
CARD = Gpu("NVIDIA GeForce RTX 4060", int(7.75 * GIB), (8, 9), sm_count=24, clock_mhz=2460)
ARCHS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_120"]
HAS_CUDA = {"cuda_available": True, "arch_list": ARCHS, "cards": [], "error": ""}
NO_CUDA = {"cuda_available": False, "arch_list": [], "cards": [], "error": ""}
BARE = Facts(torch_version="2.13.0+cpu", cores=4, ram_bytes=16 * GIB, cpu_bf16=False)
WITH_CARD = replace(BARE, gpus=(CARD,), torch_version="2.13.0", torch_cuda="13.0")


class Machine:
    """A project whose env-check sees `facts` and hears `torch_says`; `probes` counts the looks at torch."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.facts, self.torch_says, self.probes = root, BARE, NO_CUDA, 0
        self.project = self.params()
        shutil.copytree(REPO / "plugins", self.project.plugins, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.chdir(root)
        monkeypatch.delenv("TIGHTFIT_DISABLE_PLUGINS", raising=False)
        monkeypatch.setattr(env_check, "read_facts", lambda: self.facts)
        monkeypatch.setattr(env_check, "probe_torch", self.probe)
        monkeypatch.setattr(env_check, "_driver", lambda: "580.95" if self.facts.gpus else "")
        monkeypatch.setattr(env_check, "_free_vram", lambda index: 0)

    def probe(self) -> dict[str, Any]:
        self.probes += 1
        return self.torch_says

    def params(self, profile: str = "auto", **sections: Any) -> Project:
        hardware = {"profile": profile, **sections.pop("hardware", {})}
        self.project = make_project(self.root, hardware=hardware, **sections)
        return self.project

    def run(self, *args: str) -> Result:
        return CliRunner().invoke(main, list(args))

    def refused(self, exit_code: int) -> str:
        """The output of a run that must fail without a plan, a traceback or a change below data/."""
        (self.root / "data").mkdir(exist_ok=True)
        (self.root / "data" / "mine").write_text("untouched", encoding="utf-8")
        result = self.run()
        assert result.exit_code == exit_code, result.output
        assert "Error: " in result.output and "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)
        assert not self.project.plan.exists() and not self.project.inputs.exists()
        assert [p.name for p in (self.root / "data").iterdir()] == ["mine"]
        assert (self.root / "data" / "mine").read_text(encoding="utf-8") == "untouched"
        return result.output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


# ---- what it reports and writes


def test_first_three_lines_and_outputs(here: Machine) -> None:
    here.facts, here.torch_says = WITH_CARD, HAS_CUDA
    result = here.run()
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["torch", "CUDA", "GPU"]
    assert lines[0] == "torch        2.13.0 (built for CUDA 13.0)"
    assert lines[1] == "CUDA         available" and lines[2] == "GPU          NVIDIA GeForce RTX 4060"
    for words in (
        "driver       580.95",
        "card 0       capability 8.9, 7.75 GiB; bf16 yes, fp16 yes, flash attention yes",
        "kernels for  sm_75, sm_80",
        "expandable segments yes",
        "profile      rtx4060: NVIDIA GeForce RTX 4060 matches",
        "strategies   allocator → bf16 → accumulation → muon → loader → cleanup",
        "PYTORCH_ALLOC_CONF = expandable_segments:True",
        " GiB at micro-batch 8",
        "7.75 GiB less 0.4 for CUDA's context and 0.1 for the desktop on linux",
        "  peak       weights 0.00, gradients 0.00, ",
        "tokens/s expected",
    ):
        assert words in result.output, words
    assert sum(line.startswith("memory       ") for line in lines) == 1
    assert lines[-1].startswith("verdict      ready: rtx4060, bf16, ")
    plan = json.loads(here.project.plan.read_text(encoding="utf-8"))
    assert plan["profile"]["name"] == "rtx4060" and plan["recipe"]["dtype"] == "bf16"
    inputs = json.loads(here.project.inputs.read_text(encoding="utf-8"))
    assert "corpus.txt" in json.dumps(inputs)
    assert plan["memory"]["fits"] is True and plan["memory"]["forecast"]["micro_batch"] == 8
    assert plan["ladder"][0]["micro_batch"] == 8
    forecasts = json.loads(here.project.forecasts.read_text(encoding="utf-8"))
    assert plan["memory"]["forecast"] in [answer["forecast"] for answer in forecasts["answers"].values()]
    env = json.loads(here.project.env.read_text(encoding="utf-8"))
    assert env["facts"]["gpus"] == [{"name": CARD.name, "vram_gib": 7.75, "capability": [8, 9]}]
    assert env["torch"] == HAS_CUDA


def test_machine_without_a_card(here: Machine) -> None:
    result = here.run()
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[:3] == [
        "torch        2.13.0+cpu (CPU-only build)",
        "CUDA         not available",
        "GPU          none",
    ]
    assert "profile      cpu: no NVIDIA GPU found" in result.output and "skipped    bf16: " in result.output
    assert "verdict      ready: cpu, fp32, " in result.output


def test_second_run_writes_the_same_bytes_and_does_not_ask_torch(here: Machine) -> None:
    here.facts, here.torch_says = WITH_CARD, HAS_CUDA
    assert here.run().exit_code == 0
    files = (here.project.plan, here.project.inputs, here.project.env, here.project.forecasts)
    before = [path.read_bytes() for path in files]
    again = here.run()
    assert again.exit_code == 0 and here.probes == 1
    assert [path.read_bytes() for path in files] == before
    assert all(b"\r" not in content for content in before)


@pytest.mark.parametrize(
    "change",
    [
        {"torch_version": "2.14.0"},
        {"torch_cuda": "12.8"},
        {"gpus": (CARD, CARD)},
        {"environ": {"CUDA_VISIBLE_DEVICES": "0"}},
    ],
)
def test_changed_machine_is_looked_at_again(here: Machine, change: dict) -> None:
    here.facts, here.torch_says = WITH_CARD, HAS_CUDA
    here.run()
    here.facts = replace(WITH_CARD, **change)
    assert here.run().exit_code == 0 and here.probes == 2


def test_changed_corpus_and_params_change_the_outputs(here: Machine) -> None:
    here.run()
    plan, inputs = here.project.plan.read_bytes(), here.project.inputs.read_bytes()
    with (here.root / "corpus.txt").open("a", encoding="utf-8") as f:
        f.write("one more line\n")
    here.run()
    assert here.project.plan.read_bytes() == plan and here.project.inputs.read_bytes() != inputs
    here.params(train={"batch_tokens": 512})
    here.run()
    assert here.project.plan.read_bytes() != plan


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 0}', b"\xff\xfe"])
def test_damaged_notes_are_made_again(here: Machine, content: bytes) -> None:
    here.run()
    here.project.env.write_bytes(content)
    assert here.run().exit_code == 0 and here.probes == 2


@pytest.mark.parametrize(
    "failure",
    [{**NO_CUDA, "error": "OSError: a DLL is missing"}, {**NO_CUDA}],
    ids=["import", "restart needed"],
)
def test_failed_look_is_not_kept(here: Machine, failure: dict) -> None:
    here.facts, here.torch_says = WITH_CARD, failure
    here.refused(2)
    here.torch_says = HAS_CUDA  # a runtime installed, the machine restarted: no version changes
    assert here.run().exit_code == 0


def test_users_allocator_setting_is_noted(here: Machine) -> None:
    here.facts, here.torch_says = (
        replace(WITH_CARD, environ={"PYTORCH_ALLOC_CONF": "backend:native"}),
        HAS_CUDA,
    )
    assert "note       PYTORCH_ALLOC_CONF=backend:native from your environment wins" in here.run().output


def test_free_memory_is_the_visible_cards_own(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetMemoryInfo", lambda card: SimpleNamespace(free=(card + 1) * GIB)
    )
    monkeypatch.setattr(env_check, "_driver", lambda: "")
    second = replace(WITH_CARD.gpus[0], nvml_index=1)
    facts = replace(WITH_CARD, gpus=(second,), environ={"CUDA_VISIBLE_DEVICES": "1"})
    assert "2.00 free" in "\n".join(env_check.machine_lines(here.project, facts, HAS_CUDA))


# ---- machines that cannot run it: exit code 2


def test_named_profile_without_a_card(here: Machine) -> None:
    here.params("rtx4060")
    output = here.refused(2)
    assert "hardware.profile: rtx4060 needs an NVIDIA GPU" in output
    assert "set hardware.profile to auto or cpu" in output


def test_torch_without_cuda_beside_a_card(here: Machine) -> None:
    here.facts = replace(WITH_CARD, torch_version="2.13.0+cpu", torch_cuda=None)
    here.params("rtx4060")
    output = here.refused(2)
    assert "torch 2.13.0+cpu is a CPU-only build: install one with CUDA (README" in output
    here.params("auto")
    result = here.run()
    assert (
        result.exit_code == 0
        and "profile      cpu: NVIDIA GeForce RTX 4060 is here, but torch" in result.output
    )
    assert "install one with CUDA" in result.output


def test_step_that_does_not_fit_names_what_would(here: Machine) -> None:
    here.params(hardware={"memory_gib": 0.0001})
    output = here.refused(2)
    assert "memory       DOES NOT FIT: " in output
    assert "out of memory before it starts: " in output and "what would fit: " in output
    here.params(hardware={"memory_gib": 1.0})
    result = here.run()
    assert (
        result.exit_code == 0
        and "DOES NOT FIT" not in result.output
        and "hardware.memory_gib" in result.output
    )


def test_remedy_that_is_named_works(here: Machine) -> None:
    here.facts, here.torch_says = WITH_CARD, HAS_CUDA
    tight = {"memory_gib": 0.15, "strategies": {"add": [], "remove": ["chunked_head", "checkpointing"]}}
    # Eight sequences of 2,048 tokens at once need more; four need less.
    sizes: dict[str, Any] = {"model": {"block_size": 2048}}
    here.params(hardware=tight, train={"batch_tokens": 8 * 2048, "micro_batch": 8}, **sizes)
    assert "train.micro_batch: auto" in here.refused(2)
    here.params(hardware=tight, train={"batch_tokens": 8 * 2048}, **sizes)
    result = here.run()
    assert result.exit_code == 0, result.output
    plan = json.loads(here.project.plan.read_text(encoding="utf-8"))
    assert plan["execution"]["micro_batch"] < 8


def test_card_in_use_at_the_moment(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    here.facts, here.torch_says = WITH_CARD, HAS_CUDA
    monkeypatch.setattr(env_check, "_free_vram", lambda index: int(0.3 * GIB))
    output = here.refused(2)
    assert f"{CARD.name} has 0.30 GiB free at the moment, the step needs 0." in output
    assert "close what else uses the card" in output and "set hardware.memory_gib to 0.1" in output
    monkeypatch.setattr(env_check, "_free_vram", lambda index: int(0.5 * GIB))
    assert here.run().exit_code == 0


def test_torch_without_kernels_for_the_card(here: Machine) -> None:
    here.facts = replace(
        WITH_CARD, gpus=(replace(CARD, name="NVIDIA GeForce GTX 1080", compute_capability=(6, 1)),)
    )
    here.torch_says = HAS_CUDA
    output = here.refused(2)
    assert "torch 2.13.0 has no kernels for NVIDIA GeForce GTX 1080 (6.1; it has sm_75, sm_80" in output
    assert "install another build" in output


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_86"], (8, 6), True),
        (["sm_80"], (8, 9), True),  # same major, no higher minor
        (["sm_90"], (8, 9), False),
        (["sm_86"], (8, 0), False),
        (["sm_80", "compute_80"], (12, 0), True),  # PTX
        (["compute_90"], (8, 6), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        (["sm_100"], (12, 0), False),
        ([], (8, 6), False),
    ],
)
def test_binary_compatibility(archs: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert env_check.supports(archs, capability) is runs


def test_driver_that_torch_cannot_use(here: Machine) -> None:
    here.facts, here.torch_says = WITH_CARD, NO_CUDA
    output = here.refused(2)
    assert "built for CUDA 13.0 but cannot use NVIDIA GeForce RTX 4060: update the driver (580.95)" in output


def test_smaller_and_older_card_than_the_profile(here: Machine) -> None:
    here.facts = replace(WITH_CARD, gpus=(Gpu("Tesla T4", int(14.7 * GIB), (7, 5)),))
    here.torch_says = HAS_CUDA
    here.params("rtx3090", hardware={"num_processes": 2})
    output = here.refused(2)
    assert "this machine cannot run profile 'rtx3090':" in output
    for words in (
        "rtx3090 is for compute capability 8.6, Tesla T4 has 7.5",
        "rtx3090 has 24 GiB, Tesla T4 14.7",
        "hardware.num_processes: 2, but the machine has 1 GPUs; set it to that",
    ):
        assert words in output, words


def test_card_that_shows_a_little_less_than_nominal_is_no_smaller_one(here: Machine) -> None:
    here.facts, here.torch_says = (
        replace(WITH_CARD, gpus=(replace(CARD, vram_bytes=int(8 * 0.94 * GIB)),)),
        HAS_CUDA,
    )
    here.params("rtx4060")
    assert here.run().exit_code == 0


@pytest.mark.parametrize(
    ("version", "says", "words"),
    [
        ("", {}, "torch is not installed"),
        ("2.13.0", {**NO_CUDA, "error": "OSError: libcudart is missing"}, "OSError: libcudart is missing"),
    ],
)
def test_broken_torch(here: Machine, version: str, says: dict, words: str) -> None:
    here.facts, here.torch_says = replace(BARE, torch_version=version), says
    output = here.refused(2)
    assert "torch does not work: " in output and words in output and "install it again" in output


# ---- params, plugins and data


def test_bad_params(here: Machine) -> None:
    here.params(train={"lr": -1}, model={"n_layers": 3})
    output = here.refused(2)
    assert "params.yaml has problems:" in output and output.count("  - ") == 2
    assert "train.lr: -1" in output and "Did you mean 'n_layer'?" in output


def test_model_sizes_that_do_not_work(here: Machine) -> None:
    here.params(model={"n_embd": 33})
    assert "model.n_embd: 33 is not a multiple of n_head 2" in here.refused(2)


def test_unknown_profile(here: Machine) -> None:
    here.params("rtx-4060")
    assert "unknown hardware profile 'rtx-4060'. Did you mean 'rtx4060'?" in here.refused(3)


def test_broken_plugin(here: Machine) -> None:
    (here.project.plugins / "strategies" / "mine.py").write_text("x = 1\ny = undefined\n", encoding="utf-8")
    output = here.refused(3)
    assert "plugins/strategies/mine.py:2: " in output and "NameError" in output
    assert "TIGHTFIT_DISABLE_PLUGINS=plugins/strategies/mine.py" in output


@pytest.mark.parametrize("path", ["nowhere", "corpus.tx", "*.md"])
def test_missing_data_is_reported_here(here: Machine, path: str) -> None:
    here.params(data={"source": "text", "path": path})
    output = here.refused(2)
    assert f"data.path: nothing matches '{path}'" in output
    assert path != "corpus.tx" or "Did you mean 'corpus.txt'?" in output


def test_several_problems_at_once(here: Machine) -> None:
    here.params("t4", hardware={"strategies": {"add": ["bf61"]}}, data={"source": "text", "path": "nowhere"})
    output = here.refused(3)
    assert "this run cannot start:" in output
    assert "unknown strategy 'bf61'" in output and "data.path: nothing matches 'nowhere'" in output


def test_missing_card_and_missing_data_at_once(here: Machine) -> None:
    here.params("t4", data={"source": "text", "path": "nowhere"})
    output = here.refused(2)
    assert "t4 needs an NVIDIA GPU" in output and "nothing matches 'nowhere'" in output


def test_outside_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2 and "no params.yaml in" in result.output


def test_debug_raises_the_error_itself(here: Machine) -> None:
    here.params("rtx-4060")
    assert isinstance(here.run("--debug").exception, PluginError)


# ---- in a process of its own


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    project = make_project(tmp_path, hardware={"profile": "cpu"})
    shutil.copytree(REPO / "plugins", project.plugins, ignore=shutil.ignore_patterns("__pycache__"))
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    environ.pop("TIGHTFIT_DISABLE_PLUGINS", None)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *args]
        return subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, encoding="utf-8"
        )

    return run


def imported(run: subprocess.CompletedProcess[str], module: str) -> bool:
    return bool(re.search(rf"\| +{module}$", run.stderr, re.M))


def test_torch_is_imported_once_and_a_traceback_needs_debug(tmp_path: Path, alone: Callable) -> None:
    stage = ("-X", "importtime", "-m", "stages.env_check")
    first = alone(*stage)
    assert first.returncode == 0, first.stderr[-2000:]
    plan = (tmp_path / "reports" / "plan.json").read_bytes()
    second = alone(*stage)
    assert second.returncode == 0 and imported(first, "torch") and imported(second, "pluggy")
    for module in ("torch", "datasets", "accelerate"):
        assert not imported(second, module), module
    assert (tmp_path / "reports" / "plan.json").read_bytes() == plan

    make_project(tmp_path, hardware={"profile": "nothing"})
    plain, debug = alone("-m", "stages.env_check"), alone("-m", "stages.env_check", "--debug")
    assert plain.returncode == 3 and "Traceback" not in plain.stderr and "Error: " in plain.stderr
    assert debug.returncode != 0 and "Traceback" in debug.stderr and "PluginError" in debug.stderr


def test_help_of_every_command_is_light(alone: Callable) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from core.cli import main\n"
        "from core.commands.plugins import main as plugins\n"
        "paths = [[], *([name] for name in main.lazy), *(['plugins', name] for name in plugins.commands)]\n"
        "for path in paths:\n"
        "    result = CliRunner().invoke(main, [*path, '--help'])\n"
        "    heavy = {'torch', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "    print(' '.join(path) or 'tightfit', result.exit_code, sorted(heavy), repr(result.exception))\n"
    )
    lines = alone("-c", code).stdout.splitlines()
    assert {line.split()[0] for line in lines} == {"tightfit", *tightfit.lazy}
    for line in lines:
        assert line.endswith(" 0 [] None") or line.endswith(" 0 [] SystemExit(0)"), line


def test_problems_of_every_kind_are_told_together(here: Machine) -> None:
    """A batch that does not divide, an unknown strategy and a missing corpus: one message, nothing written."""
    make_project(
        here.project.root,
        train={"batch_tokens": 250},
        hardware={"profile": "cpu", "strategies": {"add": ["fp61"], "remove": []}},
        data={"source": "text", "path": "nowhere.txt"},
    )
    result = here.run()
    assert result.exit_code == 2
    for words in ("train.batch_tokens: 250", "unknown strategy 'fp61'", "nothing matches 'nowhere.txt'"):
        assert words in result.output, words
    assert not here.project.plan.exists()
