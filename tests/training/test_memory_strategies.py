"""What saves memory: checkpointing and the chunked head leave the numbers alone; the 8-bit optimizers learn."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import core.hardware
from core.launch import planned, run_training
from core.memory.simulate import simulate
from core.plan import runtime
from core.run import load_model
from core.trainer import build_training, make_accelerator, optimizer_step


def hardware(*add: str, remove: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"profile": "cpu", "strategies": {"add": list(add), "remove": ["bf16", *remove]}}


def step(project: Any) -> list[torch.Tensor]:
    """Loss, gradient norm and weights after one optimizer step of 8 sequences in two micro-batches."""
    plan, _ = planned(project)
    hook = runtime(plan).hook
    plan.set("gradient_accumulation_steps", 2, reason="", by="test")
    build = build_training(plan, hook, make_accelerator(plan), plan.model, project.params, print)
    build.model.train()
    tokens = torch.randint(0, 500, (8, 33), generator=torch.Generator().manual_seed(0))
    window = [(t[:, :-1], t[:, 1:]) for t in tokens.split(4)]
    loss, norm = optimizer_step(build, hook, window, 1.0)
    return [loss, norm, *(p.detach() for p in build.model.parameters())]


@pytest.mark.parametrize("model", [{}, {"architecture": "gpt2"}, {"architecture": "gpt2", "dropout": 0.2}])
def test_checkpointing_is_bit_for_bit_the_same_step(ready: Any, model: dict[str, Any]) -> None:
    plain = step(ready("plain", model=model, hardware=hardware()))
    again = step(ready("checkpointed", model=model, hardware=hardware("checkpointing")))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_chunked_head_is_the_same_step_to_rounding(ready: Any) -> None:
    whole = step(ready("whole", hardware=hardware(remove=("chunked_head",))))
    chunked = step(ready("chunked", hardware=hardware()))
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("checkpointing", "activations"), ("chunked_head", "logits"), ("adamw8bit", "optimizer")],
)
def test_each_saves_the_kind_of_memory_it_is_for(ready: Any, name: str, kind: str) -> None:
    sections = {"model": {"n_layer": 4, "n_embd": 96, "block_size": 64}, "train": {"batch_tokens": 1024}}
    without = ready("without", **sections, hardware=hardware(remove=("chunked_head",)))
    with_it = hardware(name, remove=() if name == "chunked_head" else ("chunked_head",))
    if name == "chunked_head":
        with_it["options"] = {name: {"tokens": 64}}
    parts = []
    for project in (without, ready("with", **sections, hardware=with_it)):
        peak = simulate(planned(project)[0], project.params, micro_batch=8).peak(8, True)
        parts.append((peak.parts[kind], peak.bytes))
    assert parts[1][0] < parts[0][0] / 2 and parts[1][1] < parts[0][1]


def real_state(optimizer: Any) -> int:
    """Bytes of the moments that an optimizer really keeps; its tables of codes are shared, and small."""
    kept = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if torch.is_tensor(tensor) and not name.startswith("qmap")
    }
    return sum(kept.values())


@pytest.mark.parametrize("name", ["adamw8bit", "bf16_weights"])
def test_the_8_bit_optimizers_learn_and_are_what_their_stand_ins_say(
    ready: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(core.hardware, "_cpu_multiplies_bf16", lambda: True)  # emulated, which is only slow
    wanted = {"add": ["bf16", name], "remove": []}
    train = {"max_steps": 60, "lr": 5e-3, "batch_tokens": 512, "eval_interval": 60}
    model = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32}
    project = ready(model=model, train=train, hardware={"profile": "cpu", "strategies": wanted})
    plan, _ = planned(project)
    hook = runtime(plan).hook
    build = build_training(plan, hook, make_accelerator(plan), plan.model, project.params, print)
    simulated = simulate(plan, project.params, micro_batch=4).peak(4, True).parts["optimizer"]
    assert real_state(build.optimizer) == simulated
    run_training(project, lambda line: None)
    log = [json.loads(line) for line in next(project.runs.glob("*/log.jsonl")).read_text().splitlines()]
    losses = [r["loss"] for r in log if "loss" in r]
    assert losses[-1] < losses[0] - 1.5
    saved = load_file(project.final_model / "model.safetensors")
    assert all(t.isfinite().all() for t in saved.values())
    dtypes = {t.dtype for t in saved.values() if t.dim() > 1}
    assert dtypes == {torch.bfloat16 if name == "bf16_weights" else torch.float32}
    load_model(project.final_model)


def test_rounding_is_right_on_average_and_never_elsewhere() -> None:
    from core.optim8bit import round_stochastically

    torch.manual_seed(0)
    exact = torch.full((200_000,), 1.001)
    target = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically(target, exact.clone())
    assert target.unique().tolist() == [1.0, 1.0078125]
    assert target.float().mean().item() == pytest.approx(1.001, abs=5e-5)
    values = torch.randn(10_000).bfloat16()
    round_stochastically(kept := torch.empty_like(values), values.float())
    assert torch.equal(kept, values)  # what bf16 holds stays


def test_rounded_updates_learn_where_rounding_to_nearest_stands_still() -> None:
    pytest.importorskip("bitsandbytes")
    from core.optim8bit import adamw8bit, adamw8bit_rounded

    def final(kind: Any) -> float:
        torch.manual_seed(0)
        goal = torch.ones(128, 64)
        w = torch.nn.Parameter(torch.full((128, 64), 0.5).bfloat16())
        optimizer = kind([{"params": [w], "weight_decay": 0.0}], lr=2e-4, betas=(0.9, 0.95))
        for _ in range(200):
            optimizer.zero_grad()
            (w.float() - goal).pow(2).sum().backward()
            optimizer.step()
        return (w.float() - goal).abs().mean().item()

    assert final(adamw8bit) == pytest.approx(0.5)
    assert final(adamw8bit_rounded) == pytest.approx(0.46, abs=0.005)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
@pytest.mark.parametrize("names", [("checkpointing", "chunked_head"), ()], ids=["small", "plain"])
def test_measuring_and_generating_never_need_more_than_a_step(
    ready: Any, architecture: str, names: tuple[str, ...]
) -> None:
    """An evaluation at the training's micro-batch, and a prompt of a whole context, beside the step."""
    from core.generate import generate
    from core.memory.trace import Trace
    from core.tokenizer import Tokenizer

    project = ready(
        model={"architecture": architecture, "n_layer": 4, "n_embd": 64, "block_size": 64},
        train={"batch_tokens": 4096},
        hardware=hardware(*names, remove=() if names else ("chunked_head",)),
    )
    plan, _ = planned(project)
    n = plan["micro_batch"]
    hook = runtime(plan).hook
    build = build_training(plan, hook, make_accelerator(plan), plan.model, project.params, print)
    with Trace() as measuring, torch.inference_mode():
        measuring.tape.begin("build")
        tokens = torch.zeros(n, 64, dtype=torch.int64)
        build.model.eval()(tokens, tokens)
    with Trace() as generating:
        generating.tape.begin("build")
        tokenizer = Tokenizer.load(project.tokens / "tokenizer")
        list(generate(build.network, tokenizer, "a lantern by the harbour " * 20, max_tokens=3))
    step_peak = simulate(plan, project.params, micro_batch=n).peak(n, True)
    for trace in (measuring, generating):
        assert 0 < peak_of(trace.tape) < step_peak.bytes - step_peak.resident


def peak_of(tape: Any) -> int:
    """The most that was alive at once [bytes]."""
    alive = peak = 0
    for event in tape.events:
        alive += tape.constant[event] if event >= 0 else -tape.constant[~event]
        peak = max(peak, alive)
    return peak
