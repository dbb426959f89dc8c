"""A step that is not finite changes nothing, is told as it is, and three in a row end the run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_project
from torch.utils._python_dispatch import TorchDispatchMode

from core import faults
from core.batches import Windows
from core.env_check import env_check
from core.errors import UserError
from core.keeper import Cursor
from core.launch import planned, run_training
from core.numbers import IN_A_ROW, SCALE_STEPS, UNDERFLOW, WATCHED, Numbers
from core.plan import runtime
from core.project import Project
from core.tokens import TokenShards
from core.trainer import build_training, make_accelerator, optimizer_step

SEQUENCES, T = 8, 32
NAN, INF = math.nan, math.inf
SMALL: dict[str, Any] = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": T},
    "train": {"max_steps": 8, "micro_batch": 4},
}
Optimizer = Callable[[Any], torch.optim.Optimizer]
OTHERS: dict[str, Optimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "AdamW, not fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=False),
}


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture(scope="module")
def small(tokenized: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a plan; nothing here changes it."""
    root = tmp_path_factory.mktemp("numbers") / "project"
    shutil.copytree(tokenized, root)
    hardware = {"profile": "cpu", "strategies": {"add": [], "remove": ["bf16"]}}
    project = make_project(root, hardware=hardware, **SMALL)
    env_check(project, lambda line: None)
    return project


class Bench:
    """A training whose steps are taken one by one."""

    def __init__(self, project: Project, optimizer: Optimizer | None = None) -> None:
        plan, _ = planned(project)
        self.hook = runtime(plan).hook
        accelerator = make_accelerator(plan)
        self.build = build_training(plan, self.hook, accelerator, plan.model, project.params, print)
        self.build.model.train()
        if optimizer:
            self.build.optimizer = accelerator.prepare(optimizer(self.build.network.parameters()))
        self.cursor = Cursor()

    def step(self, seed: int = 0, grad_clip: float = 1.0, spoiled: str = "") -> tuple[float, float]:
        """Loss and gradient norm of a step on random tokens; `spoiled` as for TIGHTFIT_FAULTS."""
        faults.disarm()
        faults.arm(spoiled)
        tokens = torch.randint(0, 512, (SEQUENCES, T + 1), generator=torch.Generator().manual_seed(seed))
        window = [(t[:, :-1], t[:, 1:]) for t in tokens.split(4)]
        loss, norm = optimizer_step(self.build, self.hook, window, grad_clip, self.cursor)
        return loss.item(), norm.item()

    def everything(self) -> dict[str, torch.Tensor]:
        """Copies of the weights, and of all that the optimizer keeps."""
        inner = self.build.optimizer.optimizer
        kept = {
            f"{key} of {name}": value
            for name, p in self.build.network.named_parameters()
            for key, value in inner.state[p].items()
            if isinstance(value, torch.Tensor)
        }
        weights = dict(self.build.network.named_parameters())
        return {name: t.detach().clone() for name, t in (weights | kept).items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- the step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_clip", [1.0, 0.0])
@pytest.mark.parametrize("spoiled", ["step.loss=nan@2", "step.loss=inf@1", "step.gradient=nan"])
def test_a_step_that_is_not_finite_changes_no_bit(small: Project, grad_clip: float, spoiled: str) -> None:
    bench = Bench(small)
    bench.step(1, grad_clip)
    before = bench.everything()
    assert {"step of", "exp_avg of", "exp_avg_sq of"} <= {" ".join(name.split()[:2]) for name in before}
    loss, norm = bench.step(2, grad_clip, spoiled)
    assert not (math.isfinite(loss) and math.isfinite(norm))
    assert changed(before, bench.everything()) == set()
    assert bench.cursor.step == 2, "it counts as a step: the data move on"
    bench.step(3, grad_clip)
    assert changed(before, bench.everything()) == set(before), "the next one is as ever"


@pytest.mark.parametrize("optimizer", [None, "SGD"])
def test_a_loss_that_is_no_number_is_not_stepped_though_its_gradients_are(
    small: Project, monkeypatch: pytest.MonkeyPatch, optimizer: str | None
) -> None:
    bench = Bench(small, OTHERS[optimizer] if optimizer else None)
    bench.step(1)
    before = bench.everything()
    monkeypatch.setattr(
        "core.trainer.spoil", lambda name, value: value + NAN if name == "step.loss" else value
    )
    loss, norm = bench.step(2)
    assert math.isnan(loss) and math.isfinite(norm)
    assert changed(before, bench.everything()) == set()


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_that_cannot_skip_is_not_called(small: Project, name: str) -> None:
    bench = Bench(small, OTHERS[name])
    bench.step(1)
    before = bench.everything()
    assert any(" of " in name for name in before)
    bench.step(2, spoiled="step.gradient=nan")
    assert changed(before, bench.everything()) == set()
    bench.step(3)
    assert changed(before, bench.everything()) == set(before)


@pytest.mark.parametrize("optimizer", [None, *OTHERS])
def test_the_run_goes_on_as_if_the_bad_window_had_not_been(small: Project, optimizer: str | None) -> None:
    ends = []
    for spoiled in ("", "step.loss=nan"):
        bench = Bench(small, OTHERS[optimizer] if optimizer else None)
        bench.step(1)
        if spoiled:
            bench.step(2, spoiled=spoiled)
        bench.step(3)
        ends.append(bench.everything())
    assert changed(*ends) == set()


@pytest.mark.parametrize("optimizer", [None, *OTHERS])
def test_a_good_step_is_bit_for_bit_a_plain_one(
    small: Project, monkeypatch: pytest.MonkeyPatch, optimizer: str | None
) -> None:
    ends = []
    for guarded in (True, False):
        if not guarded:
            monkeypatch.setattr(
                "core.trainer.step_if_finite", lambda build, loss, norm: build.optimizer.step()
            )
        bench = Bench(small, OTHERS[optimizer] if optimizer else None)
        figures = [bench.step(seed) for seed in range(3)]
        ends.append((figures, bench.everything()))
    (figures, one), (plain_figures, other) = ends
    assert figures == plain_figures and changed(one, other) == set()


class NoReading(TorchDispatchMode):
    """Raises where a value is read from the device."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.READS:
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device(small: Project) -> None:
    window = [(torch.ones(4, T, dtype=torch.int64),) * 2] * 2
    bench = Bench(small)
    with NoReading():
        for grad_clip in (1.0, 0.0):
            optimizer_step(bench.build, bench.hook, window, grad_clip, bench.cursor)
    assert bench.cursor.step == 2
    bench = Bench(small, OTHERS["SGD"])
    with NoReading(), pytest.raises(AssertionError, match="reads from the device"):
        optimizer_step(bench.build, bench.hook, window, 1.0, bench.cursor)


def test_the_guard_leaves_nothing_on_the_optimizer(small: Project) -> None:
    """A strategy that calls it again must not inherit the last step's verdict."""
    bench = Bench(small)
    bench.step(1, spoiled="step.loss=nan")
    inner = bench.build.optimizer.optimizer
    assert not hasattr(inner, "found_inf") and not hasattr(inner, "grad_scale")
    assert not bench.build.updating


# --- a run --------------------------------------------------------------------------------------------------


def train(project: Project, spec: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The log's records and what was said."""
    faults.disarm()
    faults.arm(spec)
    lines: list[str] = []
    try:
        run_training(project, lines.append)
    except UserError as error:
        lines.append(str(error))
    log = next(project.runs.glob("*/log.jsonl")).read_text("utf-8")
    return [json.loads(line) for line in log.splitlines()], lines


def test_a_skipped_step_is_logged_as_it_was_with_where_its_text_lies(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    records, said = train(project, "step.loss=nan@6")  # the second micro-batch of step 3
    (record,) = [r for r in records if r.get("skipped")]
    assert record["step"] == 3 and record["loss"] == "nan"
    (line,) = [line for line in said if "not stepped" in line]
    assert "step 3: loss nan" in line and record["tokens_at"][0] in line
    assert json.loads((project.reports / "train.json").read_text("utf-8"))["skipped_steps"] == 1

    def text(place: str) -> np.ndarray:
        name, _, start = place.removesuffix("]").partition("[")
        return np.fromfile(project.tokens / name, dtype="<u2")[int(start) : int(start) + T].astype(np.int64)

    windows = Windows(TokenShards.open(project.tokens, "train"), T, project.params.seed)
    seen = [windows[2 * SEQUENCES + i][0] for i in range(SEQUENCES)]
    assert len(record["tokens_at"]) == SEQUENCES
    assert all(map(np.array_equal, map(text, record["tokens_at"]), seen))


def test_three_in_a_row_end_the_run(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    records, said = train(project, "step.loss=nan@6-10")  # steps 3, 4 and 5
    assert [r["step"] for r in records if r.get("skipped")] == [3, 4, 5]
    assert "not finite in 3 steps in a row, up to step 5" in said[-1] and "train_000.bin[" in said[-1]
    assert not project.final_model.exists()


def test_two_in_a_row_and_two_more_do_not(ready: Callable[..., Project]) -> None:
    project = ready(**{**SMALL, "train": {**SMALL["train"], "log_interval": 1}})
    faults_at = "step.loss=nan@3-6, step.gradient=inf@5-6"  # steps 2 and 3; 5 and 6
    records, said = train(project, faults_at)
    assert [r["step"] for r in records if r.get("skipped")] == [2, 3, 5, 6]
    assert said[-1].startswith("done")
    at_5 = next(r for r in records if r.get("skipped") and r["step"] == 5)
    assert math.isfinite(at_5["loss"]) and at_5["grad_norm"] in ("inf", "nan")


# --- counting -----------------------------------------------------------------------------------------------


class Told:
    """Numbers over an accelerator that is none; scale: that of an fp16 scaler."""

    def __init__(self, scale: float | None = None) -> None:
        self.said: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.scale = scale
        scaler = None if scale is None else SimpleNamespace(get_scale=lambda: self.scale)
        accelerator = SimpleNamespace(scaler=scaler, num_processes=1, reduce=lambda values, how: values)
        build: Any = SimpleNamespace(accelerator=accelerator, say=self.said.append)
        self.numbers = Numbers(build, lambda step: [f"train_000.bin[{step}]"] * 5, self.records.append)
        self.step = 0

    def steps(self, *norms: float, loss: float = 1.0) -> tuple[float, float]:
        for norm in norms:
            self.step += 1
            self.numbers.add(self.step, torch.tensor(loss), torch.tensor(norm))
        return self.numbers.read()


def test_the_last_figures_are_returned() -> None:
    told = Told()
    told.numbers.add(1, torch.tensor(3.0), torch.tensor(0.5))
    told.numbers.add(2, torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(0.25))
    assert told.numbers.read() == (2.0, 0.25)
    assert all(map(math.isnan, told.numbers.read())), "nothing new"
    assert told.records == [] and told.numbers.skipped == 0


def test_those_between_two_log_lines_are_all_told() -> None:
    told = Told()
    told.steps(0.5, NAN, 0.5, INF, 0.5)
    assert [(r["step"], r["skipped"]) for r in told.records] == [(2, True), (4, True)]
    assert len(told.records[0]["tokens_at"]) == 5
    assert ["step 2: " in told.said[0], "step 4: " in told.said[1]] == [True, True]
    assert told.said[0].count("train_000.bin[2]") == 3 and "all in log.jsonl" in told.said[0]


def test_a_row_goes_on_over_log_lines_and_lives() -> None:
    told = Told()
    told.steps(0.5, NAN)
    told.steps(INF)
    state = json.loads(json.dumps(told.numbers.state()))
    assert (state["skipped"], state["in_a_row"]) == (2, 2)
    later = Told()
    later.numbers.load(state)
    with pytest.raises(UserError, match=f"not finite in {IN_A_ROW} steps in a row"):
        later.steps(NAN)
    later.numbers.load(state)
    later.steps(0.5, NAN, NAN)
    assert later.numbers.skipped == 4


def test_fp16_an_overflow_is_counted_and_no_warning() -> None:
    """A scaler finds its scale by trying: any number in a row."""
    told = Told(scale=65536.0)
    told.steps(*[INF] * 10)
    assert told.numbers.skipped == 10 and len(told.records) == 10 and told.said == []


def test_fp16_a_loss_that_is_no_number_is_never_the_scalers_doing() -> None:
    told = Told(scale=65536.0)
    with pytest.raises(UserError, match="3 steps in a row"):
        told.steps(NAN, NAN, NAN, loss=NAN)


def test_fp16_more_than_half_skipped_ends_the_run() -> None:
    told = Told(scale=65536.0)
    for _ in range(WATCHED // 2):
        told.steps(INF, 1.0)
    told.steps(INF)  # this one takes the place of the first that was skipped
    with pytest.raises(UserError, match=f"51 of the last {WATCHED} steps were skipped"):
        told.steps(INF)


def test_fp16_skipped_ones_of_long_ago_do_not_count() -> None:
    told = Told(scale=65536.0)
    for _ in range(5):
        told.steps(*[INF] * 40)
        told.steps(*[1.0] * 60)
    assert told.numbers.skipped == 200


def test_fp16_a_scale_below_one_that_still_overflows_ends_the_run() -> None:
    told = Told(scale=0.5)
    told.steps(*[INF] * (SCALE_STEPS - 1))
    assert len(told.said) == 1 and "loss scale fell to 0.5" in told.said[0]
    told.steps(1.0)
    told.steps(*[INF] * (SCALE_STEPS - 1))
    assert len(told.said) == 1, "told once"
    with pytest.raises(UserError, match=r"loss scale fell to 0\.5"):
        told.steps(INF)
    told = Told(scale=2.0)
    told.steps(*[INF] * 2 * SCALE_STEPS)


def test_fp16_a_scale_that_recovered_and_falls_again_is_told_again() -> None:
    told = Told(scale=0.5)
    told.steps(1.0)
    told.scale = 2.0
    told.steps(1.0)
    told.scale = 0.25
    told.steps(1.0)
    assert [line.split("fell to ")[1][:4] for line in told.said] == ["0.5:", "0.25"]


def test_fp16_counts_outlive_the_process() -> None:
    told = Told(scale=0.5)
    told.steps(*[INF] * (SCALE_STEPS - 1))
    state = json.loads(json.dumps(told.numbers.state()))
    later = Told(scale=0.5)
    later.numbers.load(state)
    with pytest.raises(UserError, match="loss scale"):
        later.steps(INF)
    told.steps(1.0)
    assert later.numbers.overflowed != told.numbers.overflowed, "what was handed out is a copy"


# --- fp16: gradients that vanish ----------------------------------------------------------------------------


def with_gradients(zeros: dict[str, float]) -> Told:
    """An embedding, a matrix and a bias; zeros: the share of each gradient that is exactly zero."""
    told = Told(scale=1.0)
    network = torch.nn.ModuleDict(
        {"embedding": torch.nn.Embedding(100, 10), "matrix": torch.nn.Linear(10, 100, bias=True)}
    )
    for name, p in network.named_parameters():
        p.grad = torch.full_like(p, 1e-6)
        p.grad.view(-1)[: round(zeros.get(name, 0.0) * p.numel())] = 0.0
    told.numbers.build.network = network
    return told


def test_a_matrix_whose_gradient_vanishes_is_named() -> None:
    told = with_gradients({"matrix.weight": 0.02})
    told.numbers.look_for_underflow(7)
    assert len(told.said) == 1
    assert "step 7: 2.0% of matrix.weight's gradient is exactly zero" in told.said[0]
    assert "in 1 of 1 matrices" in told.said[0]


@pytest.mark.parametrize(
    "zeros", [{}, {"embedding.weight": 0.9}, {"matrix.bias": 0.9}, {"matrix.weight": UNDERFLOW}]
)
def test_words_that_did_not_occur_and_biases_are_no_underflow(zeros: dict[str, float]) -> None:
    told = with_gradients(zeros)
    told.numbers.look_for_underflow(7)
    assert told.said == []


def test_what_has_no_gradient_has_none_that_vanished() -> None:
    told = with_gradients({"matrix.weight": 0.5})
    told.numbers.build.network["frozen"] = torch.nn.Linear(4, 4).requires_grad_(False)
    told.numbers.look_for_underflow(7)
    assert "in 1 of 1 matrices" in told.said[0]
