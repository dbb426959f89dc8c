"""One run: the step, what it may not depend on, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from core.errors import Stopped, UserError
from core.launch import planned, run_training
from core.run import Run, code_sha256, differences, load_model
from core.trainer import Budget, build_training, check_first_loss, make_accelerator, optimizer_step


def run(project) -> dict:
    """Train and return reports/train.json."""
    lines: list[str] = []
    run_training(project, lines.append)
    return json.loads((project.reports / "train.json").read_text(encoding="utf-8")) | {"lines": lines}


def stage_in_a_process(project) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.train"]
    return subprocess.run(
        command, cwd=project.root, capture_output=True, text=True, encoding="utf-8", check=False
    )


def weights(project) -> dict[str, torch.Tensor]:
    return load_file(project.final_model / "model.safetensors")


def one_step(project, pieces: int, micro_batch: int):
    """Loss, gradient norm and weights after one optimizer step over 8 sequences cut into `pieces`."""
    from core.plan import runtime

    plan, _ = planned(project)
    plan.set("gradient_accumulation_steps", pieces, reason="", by="test")
    hook = runtime(plan).hook
    build = build_training(plan, hook, make_accelerator(plan), plan.model, project.params, print)
    tokens = torch.randint(0, 512, (8, 33), generator=torch.Generator().manual_seed(0))
    window = [(t[:, :-1], t[:, 1:]) for t in tokens.split(micro_batch)]
    loss, norm = optimizer_step(build, hook, window, 1.0)
    return loss.item(), norm.item(), [p.detach().clone() for p in build.model.parameters()]


# Muon's first update has the same size in every direction, those too in which there is nothing but rounding.
ADAMW: dict = {"hardware": {"strategies": {"add": [], "remove": ["muon"]}}, "train": {"lr": 1e-3}}


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_a_window_cut_differently_is_the_same_step(ready, architecture):
    project = ready(model={"architecture": architecture}, **ADAMW)
    loss, norm, whole = one_step(project, 1, 8)
    for pieces, micro_batch in ((2, 4), (8, 1)):
        loss_, norm_, cut = one_step(project, pieces, micro_batch)
        assert loss_ == pytest.approx(loss, rel=1e-6)
        assert norm_ == pytest.approx(norm, rel=1e-4)
        for a, b in zip(whole, cut, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_a_window_is_normalised_by_its_tokens_not_by_its_pieces(ready):
    """Pieces of unequal size count by their tokens: the step is that of the whole window."""
    project = ready(**ADAMW)
    _, _, whole = one_step(project, 1, 8)
    _, _, uneven = one_step(project, 2, 6)  # 6 and 2 sequences
    for a, b in zip(whole, uneven, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_a_run_learns_and_leaves_its_files(ready):
    project = ready(train={"max_steps": 60, "lr": 5e-3, "batch_tokens": 512, "eval_interval": 20})
    result = run(project)
    assert result["steps"] == 60 and result["tokens"] == 60 * 512
    log = [json.loads(line) for line in next(project.runs.glob("*/log.jsonl")).read_text().splitlines()]
    losses = [r["loss"] for r in log if "loss" in r]
    assert losses[0] == pytest.approx(6.24, abs=0.2) and losses[-1] < losses[0] - 1.5
    val = [r["val_loss"] for r in log if "val_loss" in r]
    assert len(val) == 3 and val[-1] < val[0]
    curve = (project.reports / "curve.tsv").read_text(encoding="utf-8").splitlines()
    assert curve[0].split("\t") == ["step", "tokens", "lr", "loss"] and curve[-1].startswith("60\t")
    assert any("tokens/s" in line and "of peak" in line and "left" in line for line in result["lines"])
    model, facts = load_model(project.final_model)
    assert facts["step"] == 60 and model.config.vocab_size == 512


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_micro_batch_changes_nothing_but_rounding(ready, micro_batch):
    reference = ready("a", train={"micro_batch": 4})
    run(reference)
    other = ready("b", train={"micro_batch": micro_batch})
    run(other)
    for name, tensor in weights(reference).items():
        torch.testing.assert_close(weights(other)[name], tensor, rtol=1e-3, atol=1e-4)


def test_same_params_same_bits_and_the_same_run(ready):
    one, two = ready("a"), ready("b")
    run(one), run(two)
    a, b = weights(one), weights(two)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [p.name for p in one.runs.iterdir()] == [p.name for p in two.runs.iterdir()]


def test_workers_change_nothing(ready):
    one = ready("a")
    run(one)
    options = {
        "profile": "cpu",
        "strategies": {"add": [], "remove": ["bf16"]},
        "options": {"loader": {"workers": 2}},
    }
    two = ready("b", hardware=options)
    run(two)
    a, b = weights(one), weights(two)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("sections", "same_run"),
    [
        ({"train": {"micro_batch": 2}}, True),
        ({"train": {"log_interval": 1}}, True),
        ({"train": {"lr": 2e-3}}, False),
        ({"seed": 2}, False),
        ({"model": {"n_layer": 1}}, False),
    ],
)
def test_fingerprint_covers_what_changes_the_numbers(ready, sections, same_run):
    project = ready(train={"max_steps": 1})
    run(project)
    train = {"max_steps": 1, **sections.pop("train", {})}
    run(ready(train=train, **sections))
    assert (len(list(project.runs.iterdir())) == 1) is same_run


def test_comments_and_docstrings_do_not_count(tmp_path, monkeypatch):
    import core.run

    monkeypatch.setattr(core.run, "__file__", str(tmp_path / "run.py"))

    def sha(source: str) -> str:
        (tmp_path / "a.py").write_text(source, encoding="utf-8")
        return code_sha256(("a.py",))

    plain = sha('"""Doc."""\nx = 1\ndef f():\n    """Doc."""\n    return 2\n')
    assert plain == sha('"""Other."""\n# why\nx = 1  # one\n\n\ndef f():\n    return 2\n')
    assert plain != sha('"""Doc."""\nx = 1\ndef f():\n    """Doc."""\n    return 3\n')


def test_best_or_last_weights(ready, monkeypatch):
    def worse_and_worse(*args):
        losses.append(5.0 + len(losses))
        return {"loss": losses[-1], "bits_per_byte": 1.0, "sequences_at_once": 1}

    monkeypatch.setattr("core.trainer.measure", worse_and_worse)
    steps = {}
    for which in ("best", "last"):
        losses: list[float] = []
        project = ready(which, train={"max_steps": 12, "final_weights": which})
        run(project)
        steps[which] = json.loads((project.final_model / "config.json").read_text(encoding="utf-8"))["step"]
    assert steps == {"best": 4, "last": 12}


def test_budgets():
    steps = Budget(10, None)
    assert not steps.spent(9, 1e9) and steps.spent(10, 0.0)
    assert steps.seconds_left(5, 50.0) == 50.0
    time = Budget(None, 60.0)
    assert not time.spent(0, 100.0), "at least one step"
    assert time.share(3, 30.0) == 0.5 and time.spent(3, 60.0)
    assert time.share(3, 90.0) == 1.0, (
        "an evaluation took more than what was left: the rate must not turn negative"
    )


def test_a_run_in_minutes_ends(ready):
    result = run(ready(train={"max_minutes": 0.02}))
    assert result["steps"] >= 1
    assert result["seconds"] < 30


def test_token_budget_is_whole_steps(ready):
    assert run(ready(train={"max_tokens": 700}))["steps"] == 3  # 2.73 batches of 256


def test_first_loss_far_from_ln_v_stops():
    check_first_loss(6.3, 512)
    for loss in (4.0, 9.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"near ln\(512\) = 6.24"):
            check_first_loss(loss, 512)


def test_a_second_run_of_the_same_refuses(ready):
    project = ready()
    run_ = Run(project.runs / "abc", {})
    with run_.held(), pytest.raises(Stopped, match=f"trained by process {os.getpid()} on"), run_.held():
        pass
    with run_.held():
        pass


def test_corpus_shorter_than_a_context(ready):
    project = ready(model={"block_size": 65536, "n_layer": 1}, train={"batch_tokens": 65536, "max_steps": 1})
    with pytest.raises(UserError, match="shorter than one context"):
        run(project)


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        ({"a": {"b": 1, "c": [1, 2]}}, []),
        ({"a": {"b": 1, "c": [1, 3]}}, ["a.c[1] is 2, not 3"]),
        ({"a": {"b": 2, "c": [1]}}, ["a.b is 1, not 2", "a.c is [1, 2], not [1]"]),
        ({"a": {"b": 1, "c": [1, 2], "d": "x"}}, ["a.d is None, not x"]),
    ],
)
def test_where_documents_differ_is_named(ours, told):
    assert differences({"a": {"b": 1, "c": [1, 2]}}, ours) == told


def test_stale_plan_is_refused(ready):
    project = ready()
    plan = json.loads(project.plan.read_text(encoding="utf-8"))
    plan["execution"]["micro_batch"] = 1
    project.plan.write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not match .*\(execution.micro_batch is 1, not \d+\)"):
        run(project)


def test_stale_plan_with_one_more_null_is_refused(ready):
    project = ready()
    plan = json.loads(project.plan.read_text(encoding="utf-8"))
    project.plan.write_text(json.dumps({**plan, "of_another_version": None}), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not match .*\(a key that is null"):
        run(project)


def test_two_processes_train_the_same_model(ready):
    one = ready("one", train={"max_steps": 4})
    run(one)
    hardware = {"profile": "cpu", "num_processes": 2, "strategies": {"add": [], "remove": ["bf16"]}}
    two = ready("two", train={"max_steps": 4}, hardware=hardware)
    done = stage_in_a_process(two)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=1e-4)
    assert done.stdout.count("step 4/4") == 1, "only one process speaks"


@pytest.mark.parametrize(("free", "share"), [(12, 0.25), (2, 0.125)])
def test_memory_is_capped_at_the_plans_budget_on_a_device_without_an_index(ready, monkeypatch, free, share):
    """At what is free where that is less. accelerate's device is "cuda" without an index, which torch's cap refuses."""
    from core.hookspecs import GIB

    project = ready()
    plan, _ = planned(project)
    plan.profile = replace(plan.profile, device="cuda", vram_gib=4, compute_capability=(8, 6))
    plan.memory_budget = 4 * GIB
    capped = []

    class Fake:
        num_processes = 1
        device = torch.device("cuda")

        def __init__(self, **kwargs):
            pass

    monkeypatch.setattr("accelerate.Accelerator", Fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, i: capped.append((f, i)))
    make_accelerator(plan)
    assert capped == [(share, 0)]


def test_no_silent_fall_back_to_the_cpu(ready):

    project = ready()
    plan, _ = planned(project)
    plan.profile = replace(plan.profile, device="cuda", vram_gib=4, compute_capability=(8, 6))
    with pytest.raises(UserError, match="the plan wants cuda, torch offers cpu"):
        make_accelerator(plan)


def test_last_weights_and_a_final_evaluation_when_time_runs_out_in_an_evaluation(ready, monkeypatch):
    import time

    from core import trainer

    real = trainer.measure

    def slow(*args):
        time.sleep(0.3)
        return real(*args)

    monkeypatch.setattr(trainer, "measure", slow)
    project = ready(train={"max_minutes": 0.004, "eval_interval": 1, "final_weights": "last"})
    result = run(project)
    facts = json.loads((project.final_model / "config.json").read_text(encoding="utf-8"))
    assert facts["weights"] == "last" and facts["step"] == result["steps"]
    (run_,) = project.runs.iterdir()
    records = [json.loads(line) for line in (run_ / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(record["lr"] >= 0 for record in records if "lr" in record)


def test_a_failing_process_hands_its_exit_code_back(ready):
    hardware = {"profile": "cpu", "num_processes": 2, "strategies": {"add": [], "remove": ["bf16"]}}
    project = ready(hardware=hardware)
    (project.tokens / "train_000.bin").unlink()
    done = stage_in_a_process(project)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "train_000.bin is missing" in done.stderr


def test_out_of_memory_is_told_with_the_remedy(ready, monkeypatch):
    from click.testing import CliRunner

    from stages.train import main

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    ready()
    monkeypatch.setattr("core.trainer.optimizer_step", full)
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert "out of memory at step 1 with a micro-batch of 1" in result.output
    assert (
        "set a smaller model.block_size or model.preset" in result.output and "Traceback" not in result.output
    )


def test_options_that_json_writes_differently_are_no_stale_plan(ready):
    """A tuple comes back from plan.json as a list."""
    plugin = """
from core.hookspecs import Strategy, hookimpl

class Mine(Strategy):
    name, defaults = "mine", {"betas": (0.9, 0.95)}

@hookimpl
def strategies():
    return Mine()
"""
    project = ready()
    (project.plugins / "strategies" / "mine.py").write_text(plugin, encoding="utf-8")
    hardware = {"profile": "cpu", "strategies": {"add": ["mine"], "remove": ["bf16"]}}
    assert run(ready(train={"max_steps": 1}, hardware=hardware))["steps"] == 1


def test_an_option_that_json_does_not_know_trains_too(ready):
    """plan.json, run.json and the fingerprint all take it as text."""
    plugin = """
from pathlib import PurePosixPath

from core.hookspecs import Strategy, hookimpl

class Mine(Strategy):
    name, affects, defaults = "mine", "recipe", {"where": PurePosixPath("a/b")}

@hookimpl
def strategies():
    return Mine()
"""
    project = ready()
    (project.plugins / "strategies" / "mine.py").write_text(plugin, encoding="utf-8")
    hardware = {"profile": "cpu", "strategies": {"add": ["mine"], "remove": ["bf16"]}}
    assert run(ready(train={"max_steps": 1}, hardware=hardware))["steps"] == 1
