"""Devices and memory under the guides' names: the CPU for real, a made-up card for the rest."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers import make_project

import core.memory as memory
from core.env_check import TORCH_HELP
from core.errors import UserError
from core.hardware import try_all_gpus, try_gpu
from core.hookspecs import GIB
from core.memory import Compute, compute
from core.memory.allocator import AllocatorSettings
from core.memory.tape import KINDS, Tape
from core.model_config import PRESETS, ModelConfig
from core.params import ModelParams

PAGE = Path(__file__).parents[2] / "docs" / "guides.md"
WORK = ["train", "evaluate", "generate", "data", "tokenize"]
MODEL = ModelConfig.resolve(ModelParams(preset="124m"), 50257)
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


class Card:
    """A made-up card of 8 GiB, 6 of them free; `calls` notes what is done to it."""

    def __init__(self) -> None:
        self.count, self.capability, self.name = 1, (8, 9), "NVIDIA GeForce RTX 4060"
        self.allocated, self.reserved, self.peak = 1 * GIB, 1.5 * GIB, 1.25 * GIB
        self.free, self.total = 6 * GIB, 8 * GIB
        self.arch_list = ["sm_75", "sm_80", "sm_86", "sm_90"]
        self.calls: list[str] = []

    def note(self, call: str) -> Callable[..., None]:
        return lambda *args: self.calls.append(call)

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.free, self.reserved = self.free + self.reserved - self.allocated, self.allocated

    def reset(self, device: Any) -> None:
        self.calls.append("reset_peak")
        self.peak = self.allocated


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_current", None)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, function in {
        "is_available": lambda: True,
        "device_count": lambda: card.count,
        "get_arch_list": lambda: card.arch_list,
        "get_device_capability": lambda device: card.capability,
        "get_device_name": lambda device: card.name,
        "memory_allocated": lambda device: card.allocated,
        "memory_reserved": lambda device: card.reserved,
        "max_memory_allocated": lambda device: card.peak,
        "mem_get_info": lambda device: (card.free, card.total),
        "synchronize": card.note("synchronize"),
        "ipc_collect": card.note("ipc_collect"),
        "empty_cache": card.empty_cache,
        "reset_peak_memory_stats": card.reset,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *args: (card.calls.append("gc"), collect(*args))[1])
    return card


# ---- try_gpu, try_all_gpus


def test_without_a_gpu_it_is_the_cpu(no_gpu: None) -> None:
    assert try_gpu() == try_gpu(10) == CPU
    assert try_all_gpus() == [CPU]


def test_gpus_by_number(card: Card) -> None:
    card.count = 2
    assert try_gpu() == CARD and try_gpu(1) == torch.device("cuda:1")
    assert try_gpu(2) == CPU
    assert try_all_gpus() == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_a_card_that_the_driver_cannot_use_does_not_count(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert try_gpu() == CPU and try_all_gpus() == [CPU]


@pytest.mark.parametrize("i", [-1, 0.5, "0"])
def test_no_number_of_a_gpu(i: Any) -> None:
    with pytest.raises(UserError, match=re.escape(repr(i))):
        try_gpu(i)


# ---- modes and workloads


def test_auto_without_a_gpu(no_gpu: None) -> None:
    c = memory.initialize_compute("auto")
    assert {c.device(w) for w in WORK} == {CPU}
    assert c.reason.startswith("everything on the CPU: torch ") and TORCH_HELP in c.reason
    assert c.reason in repr(c)


def test_auto_and_gpu_with_one(card: Card) -> None:
    for mode in ("auto", "gpu"):
        c = Compute(mode)
        assert {c.device(w) for w in WORK} == {CARD} and card.name in c.reason


def test_gpu_without_a_gpu_names_the_remedy(no_gpu: None) -> None:
    before = memory.get_compute()
    with pytest.raises(UserError, match=r"mode: gpu needs a GPU .*take mode auto or cpu") as e:
        memory.initialize_compute("gpu")
    assert TORCH_HELP in str(e.value)
    assert memory.get_compute() is before


def test_driver_missing(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"finds no GPU: look whether nvidia-smi shows one"):
        Compute("gpu")


def test_a_card_without_kernels_in_this_build(card: Card) -> None:
    card.name, card.capability = "NVIDIA GeForce GTX 1050", (6, 1)
    with pytest.raises(UserError, match=r"no kernels for NVIDIA GeForce GTX 1050 \(it has sm_75"):
        Compute("gpu")
    assert Compute("auto").device() == CPU


def test_hybrid(card: Card) -> None:
    c = Compute("hybrid")
    assert {w: c.device(w).type for w in WORK} == {
        "train": "cuda",
        "evaluate": "cuda",
        "generate": "cuda",
        "data": "cpu",
        "tokenize": "cpu",
    }
    assert "data, tokenize on the CPU" in c.reason and card.name in c.reason


def test_hybrid_without_a_gpu_says_so(no_gpu: None) -> None:
    c = Compute("hybrid")
    assert {c.device(w) for w in WORK} == {CPU}
    assert c.reason.startswith("everything on the CPU: torch ")


def test_cpu_with_a_gpu_does_not_ask_it(card: Card) -> None:
    c = memory.initialize_compute("cpu")
    assert {c.device(w) for w in WORK} == {CPU}
    assert memory.get_memory_stats()["total_gib"] == psutil.virtual_memory().total / GIB
    memory.cleanup_after_training(lambda line: None)
    assert set(card.calls) == {"gc"}


def test_misspelt_words() -> None:
    with pytest.raises(UserError, match=r"'hybird' is none of auto, cpu, gpu, hybrid. Did you mean 'hybrid'"):
        Compute("hybird")
    with pytest.raises(UserError, match=r"no workload 'tokenise'. Did you mean 'tokenize'"):
        Compute("cpu").device("tokenise")


def test_get_compute_decides_auto_once(no_gpu: None) -> None:
    c = memory.get_compute()
    assert c.mode == "auto" and memory.get_compute() is c
    assert memory.initialize_compute("cpu") is memory.get_compute() is not c


def test_threads_stay_as_they_are(card: Card) -> None:
    before = torch.get_num_threads(), torch.get_num_interop_threads()
    for mode in compute.MODES:
        Compute(mode)
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == before


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("NVIDIA GeForce RTX 2050", (8, 6), "bf16"),
        ("Tesla V100-SXM2-16GB", (7, 0), "fp16"),
        ("Tesla T4", (7, 5), "fp16"),
        ("NVIDIA GeForce GTX 1650", (7, 5), "fp32"),
    ],
)
def test_amp_dtype_is_the_profiles(card: Card, name: str, capability: tuple[int, int], dtype: str) -> None:
    card.name, card.capability, card.arch_list = name, capability, [*card.arch_list, "sm_70"]
    assert Compute().amp_dtype() == dtype


# ---- memory


KEYS = {"allocated_gib", "reserved_gib", "peak_gib", "total_gib", "free_gib", "utilization_percent"}


def test_stats_on_the_cpu() -> None:
    memory.initialize_compute("cpu")
    stats = memory.get_memory_stats()
    assert stats.keys() == KEYS
    assert 0.01 < stats["allocated_gib"] == stats["reserved_gib"] <= stats["peak_gib"] * 1.01
    assert 0 < stats["free_gib"] < stats["total_gib"] and stats["peak_gib"] < stats["total_gib"]
    assert 0 < stats["utilization_percent"] < 100


def test_cpu_counts_what_is_allocated() -> None:
    memory.initialize_compute("cpu")
    used, _ = memory.vram_usage_gib()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.vram_usage_gib()[0] - used == pytest.approx(1 / 16, abs=0.02)
    del block
    assert memory.optimize_memory(aggressive=True) >= 0
    assert memory.get_memory_stats()["peak_gib"] >= used + 1 / 32


def test_stats_on_a_card_are_the_drivers(card: Card) -> None:
    assert memory.get_memory_stats() == {
        "allocated_gib": 1.0,
        "reserved_gib": 1.5,
        "peak_gib": 1.25,
        "total_gib": 8.0,
        "free_gib": 6.0,  # not 8 - 1
        "utilization_percent": 25.0,
    }
    assert memory.vram_usage_gib() == (1.0, 1.5)


def test_log(card: Card, capsys: pytest.CaptureFixture[str]) -> None:
    stats = memory.log_memory_stats("epoch 3")
    line = "1.00 GiB allocated, 1.50 reserved, peak 1.25; 6.00 of 8.00 GiB free on the card, 25 % in use"
    assert capsys.readouterr().out == f"epoch 3: {line}\n"
    assert stats == memory.get_memory_stats()
    said: list[str] = []
    memory.initialize_compute("cpu")
    memory.log_memory_stats(say=said.append)
    assert re.fullmatch(
        r"memory: process [\d.]+ GiB, peak [\d.]+; [\d.]+ of [\d.]+ GiB of RAM available, \d+ % in use",
        said[0],
    )


def test_collects_before_it_empties_the_cache(card: Card) -> None:
    assert memory.optimize_memory() == 0.5
    assert card.calls == ["gc", "empty_cache"]
    assert memory.optimize_memory(aggressive=True) == 0.0
    assert card.calls[2:] == ["gc", "synchronize", "ipc_collect", "empty_cache"]


def test_logs_the_peak_before_it_resets_it(card: Card) -> None:
    memory.initialize_compute("gpu")
    stats = memory.cleanup_after_training(lambda line: card.calls.append(line))
    assert card.calls[0].startswith("after training: ") and "peak 1.25" in card.calls[0]
    assert card.calls[1:-1] == ["gc", "synchronize", "ipc_collect", "empty_cache", "reset_peak"]
    assert card.calls[-1] == "given back: 0.50 GiB"
    assert stats["peak_gib"] == 1.25 and memory.get_memory_stats()["peak_gib"] == 1.0


def test_reset_peak(card: Card) -> None:
    memory.initialize_compute("cpu")
    memory.reset_peak_memory_stats()
    assert card.calls == []
    memory.initialize_compute("gpu")
    memory.reset_peak_memory_stats()
    assert card.calls == ["reset_peak"]


# ---- step_memory


def test_what_a_steps_memory_is_for() -> None:
    small, large = (memory.step_memory(MODEL, n, "bf16") for n in (1, 8))
    assert tuple(small) == KINDS
    n_params = MODEL.n_params
    for name, nbytes in {"weights": 4, "gradients": 4, "optimizer": 8}.items():
        for parts in (small, large):
            assert nbytes * n_params <= parts[name] < 1.01 * nbytes * n_params, name
    assert large["activations"] > 2 * small["activations"]
    assert large["logits"] >= 8 * MODEL.block_size * MODEL.vocab_size * 4
    assert memory.step_memory(MODEL, 8, "fp16") == large
    assert sum(memory.step_memory(MODEL, 8, "fp32").values()) > sum(large.values())
    on_cpu = memory.step_memory(MODEL, 8, "bf16", device="cpu")  # core.fused keeps less there
    assert on_cpu["activations"] < large["activations"] and on_cpu["weights"] == large["weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "float16"), "dtype: 'float16' is none of bf16, fp16, fp32"),
        ((1, "bf61"), "Did you mean 'bf16'"),
        ((1, "bf16", "gpu"), "device: 'gpu' is none of cuda, cpu"),
        ((0, "bf16"), "micro_batch: 0 should be a whole number, 1 or more"),
        ((1.5, "bf16"), "micro_batch: 1.5 should be"),
    ],
)
def test_step_memory_of_what_there_is_not(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        memory.step_memory(MODEL, *arguments)


def test_importing_it_imports_no_torch_and_no_numpy() -> None:
    code = (
        "import sys, core.memory, core.memory.compute\n"
        "from core.memory import suggest_batch_size, step_memory\n"
        "print(sorted({'torch', 'numpy', 'accelerate'} & set(sys.modules)), dir(core.memory)[:0])"
    )
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, cwd=PAGE.parents[1], capture_output=True, text=True, encoding="utf-8")
    assert out.stdout == "[] []\n", out
    with pytest.raises(AttributeError, match="no attribute 'sugest_batch_size'"):
        memory.sugest_batch_size  # noqa: B018


# ---- suggest_batch_size


@pytest.fixture
def plain_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)


def tape_for(model: ModelConfig, dtype: str, card: Card) -> Tape:
    return compute._tape_of(model, dtype, "cuda", card.capability)


def assert_largest(n: int, tape: Tape, nbytes: float, settings: AllocatorSettings | None = None) -> None:
    """n sequences fit into `nbytes` of a card, and 2 n do not."""
    assert n & (n - 1) == 0
    fits = [tape.fits(m, True, settings or AllocatorSettings(), int(nbytes)) for m in (n, 2 * n)]
    assert fits == [True, False]


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("NVIDIA GeForce RTX 4060", (8, 9), "bf16"),
        ("Tesla T4", (7, 5), "fp16"),
        ("NVIDIA GeForce GTX 1650", (7, 5), "fp32"),
    ],
)
def test_suggestion_fits_and_twice_as_much_does_not(
    card: Card, plain_allocator: None, name: str, capability: tuple[int, int], dtype: str
) -> None:
    card.name, card.capability = name, capability
    sizes = []
    for free in (4, 6, 12, 24, 80):
        card.free = free * GIB
        sizes.append(memory.suggest_batch_size(model=MODEL))
        assert_largest(sizes[-1], tape_for(MODEL, dtype, card), card.free)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_suggestion_follows_memory_model_and_multiplier(card: Card, plain_allocator: None) -> None:
    tape = tape_for(MODEL, "bf16", card)
    card.free = card.total = tape.play(16, True).peak_reserved
    assert memory.suggest_batch_size(model=MODEL) == 16
    assert memory.suggest_batch_size(0.9, model=MODEL) == 8
    assert memory.suggest_batch_size(model=replace(MODEL, n_layer=14)) == 8
    card.free = tape.peak(16, True).bytes - 1
    assert memory.suggest_batch_size(model=MODEL) == 8
    assert memory.suggest_batch_size(model=replace(MODEL, n_layer=10)) == 16
    card.free *= 3
    assert memory.suggest_batch_size(model=MODEL) == 32


def test_suggestion_knows_this_process_s_allocator(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    tape, seen = tape_for(MODEL, "bf16", card), []
    fits = Tape.fits
    monkeypatch.setattr(Tape, "fits", lambda *args: (seen.append(args[3]), fits(*args))[1])
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        monkeypatch.setenv(variable, "expandable_segments:True")
        n = memory.suggest_batch_size(model=MODEL)
        assert set(seen) == {AllocatorSettings(expandable_segments=True)}
        assert_largest(n, tape, card.free, seen[0])
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")


def test_on_the_cpu_half_the_available_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    ram = SimpleNamespace(total=32 * GIB, available=16 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: ram)
    c = memory.initialize_compute("cpu")
    n = memory.suggest_batch_size(model=MODEL)
    tape = compute._tape_of(MODEL, c.amp_dtype(), "cpu")
    assert tape.peak(n, True).bytes <= 8 * GIB < tape.peak(2 * n, True).bytes


def test_model_is_the_projects(
    card: Card, plain_allocator: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
    remove: dict[str, Any] = {"strategies": {"add": [], "remove": ["bf16"]}}
    project = make_project(tmp_path, model=sizes)
    monkeypatch.chdir(project.root)
    model = ModelConfig.resolve(project.params.model, project.params.tokenizer.n_vocab)
    assert memory.suggest_batch_size() == memory.suggest_batch_size(model=model)
    make_project(tmp_path, model=sizes, hardware=remove)
    assert_largest(memory.suggest_batch_size(), tape_for(model, "fp32", card), card.free)


def test_no_project(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no params.yaml"):
        memory.suggest_batch_size()


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_too_large_a_model_names_a_preset_that_fits(card: Card, architecture: Any) -> None:
    large = ModelConfig.resolve(ModelParams(architecture=architecture, preset="1.5b"), 50257)
    with pytest.raises(UserError, match="model: one sequence of 1024 tokens needs") as e:
        memory.suggest_batch_size(model=large)
    (needs,) = re.findall(r"needs ([\d.]+) GiB .* and 6\.00 GiB may be filled", str(e.value))
    needed = tape_for(large, "bf16", card).peak(1, True).bytes / GIB
    assert needed <= float(needs) + 0.01 < 1.1 * needed
    (named,) = re.findall(r"set model.preset to (\S+)", str(e.value))
    fits = ModelConfig.resolve(ModelParams(architecture=architecture, preset=named), 50257)
    assert memory.suggest_batch_size(model=fits) >= 1
    larger = list(PRESETS)[list(PRESETS).index(named) + 1]
    too_large = ModelConfig.resolve(ModelParams(architecture=architecture, preset=larger), 50257)
    with pytest.raises(UserError):
        memory.suggest_batch_size(model=too_large)


def test_nothing_fits(card: Card) -> None:
    card.free = 1 << 20
    with pytest.raises(UserError, match=r"no preset fits either: lower model.block_size"):
        memory.suggest_batch_size(model=MODEL)


@pytest.mark.parametrize("multiplier", [0, -1, 1.01, float("nan"), "half", None])
def test_multiplier_out_of_range(multiplier: Any) -> None:
    with pytest.raises(UserError, match=r"vram_usage_multiplier: .* should be above 0 and at most 1"):
        memory.suggest_batch_size(multiplier, model=MODEL)


# ---- docs/guides.md


BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("code", BLOCKS)
def test_the_page_runs(code: str, no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_project(tmp_path).root)
    exec(compile(code, PAGE.name, "exec"), {})


def test_the_page_names_everything() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(BLOCKS) >= 3
    for name in {*memory.__all__, "try_gpu", "try_all_gpus", "tightfit bench devices"} - {"Compute"}:
        assert f"`{name}" in text, name
    for mode in compute.MODES:
        assert f"`{mode}`" in text
    for key in KEYS:
        assert f"`{key}`" in text
