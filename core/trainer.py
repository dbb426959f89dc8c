"""One run, top to bottom.

accelerate places the model, does mixed precision, accumulation, clipping and launching. Data order, schedule and files
are ours: accelerate's samplers and checkpoints are neither exact nor atomic.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from core.batches import Positions, Windows, micro_batches
from core.errors import UserError
from core.evaluate import measure
from core.hookspecs import GIB, Build, Plan
from core.model_config import ModelConfig
from core.monitor import CardMonitor, Progress, card_line, clock, peak_flops
from core.optim import adamw, check_groups, lr_factor
from core.params import TrainParams
from core.plan import runtime
from core.project import Project
from core.run import Run, save_model
from core.tokens import TokenShards

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

# A fresh network is nearly uniform: its loss is ln(V) plus half the variance of its logits, some 0.3 nats at most
# with N(0, 0.02) weights. Further away, something is broken.
FIRST_LOSS_TOLERANCE = 1.0


def train(project: Project, plan: Plan, run: Run, echo: Callable[[str], None]) -> dict[str, Any]:
    """Train the plan's model on the project's tokens; return what the report needs.

    Leaves log.jsonl and the best and last weights in the run's folder. Raises UserError where the first loss is not
    near ln(V), or where the launch does not match the plan.
    """
    params, hook = project.params.train, runtime(plan).hook
    shards, held_out = TokenShards.open(project.tokens, "train"), TokenShards.open(project.tokens, "val")
    accelerator = make_accelerator(plan, hook)
    main = accelerator.is_main_process
    budget = Budget.of(params)
    progress = Progress(budget.steps, echo, enabled=main)
    build = build_training(project, plan, hook, accelerator, shards.manifest["n_vocab"], progress.say)
    config: ModelConfig = accelerator.unwrap_model(build.model).config
    card, (peak, peak_source) = CardMonitor(accelerator.device), peak_flops(plan, accelerator.device)
    for split in (shards, held_out):
        check_length(split, config.block_size)
    windows = Windows(shards, config.block_size, project.params.seed)
    batches = micro_batches(
        windows,
        Positions(plan.sequences, plan["micro_batch"], accelerator.process_index, accelerator.num_processes),
        plan,
    )
    progress.say(describe(config, plan, windows, budget, peak, peak_source))

    best, losses, evaluations = math.inf, [], []
    step, waited, started = 0, 0.0, time.perf_counter()
    logged = (0, started)
    loss: Tensor | None = None
    build.model.train()
    with run.log.open("w", encoding="utf-8", newline="\n") if main else contextlib.nullcontext() as log:
        try:
            while not budget.spent(step, time.perf_counter() - started):
                share = budget.share(step, time.perf_counter() - started)
                lr = set_lr(build, params, step, share)
                window = list(islice(batches, plan["gradient_accumulation_steps"]))
                loss, grad_norm = optimizer_step(build, hook, window, params.grad_clip)
                step += 1
                last = budget.spent(step, time.perf_counter() - started)

                due = step % params.log_interval == 0 or step == 1 or last
                fields: list[str] = []
                if due:
                    # The only read from the device: everything up to here may still be running.
                    value = accelerator.reduce(loss, "sum").item()
                    now = time.perf_counter()
                    rate = (step - logged[0]) * params.batch_tokens / max(now - logged[1] - waited, 1e-9)
                    record = {"step": step, "tokens": step * params.batch_tokens, "loss": value, "lr": lr}
                    record |= {"grad_norm": grad_norm.item(), "tokens_per_second": rate}
                    if peak:
                        record["share_of_peak"] = (
                            rate * config.flops_per_token / (peak * accelerator.num_processes)
                        )
                    record |= card.read()
                    if step == 1:
                        check_first_loss(value, config.vocab_size)
                    hook.on_step_end(build=build, step=step, metrics=record)
                    losses.append(record)
                    write_line(log, record)
                    left = budget.seconds_left(step, now - started)
                    fields = step_line(record, left)
                    logged, waited = (step, now), 0.0
                progress.advance(step, fields, due)

                if step % params.eval_interval == 0 or last:
                    before = time.perf_counter()
                    result = measure(
                        build.model, accelerator, held_out, plan["micro_batch"], params.eval_tokens
                    )
                    record = {"step": step, "tokens": step * params.batch_tokens}
                    record |= {"val_loss": result["loss"], "val_bits_per_byte": result["bits_per_byte"]}
                    improved = result["loss"] < best
                    best = min(best, result["loss"])
                    hook.on_evaluate_end(build=build, step=step, metrics=record)
                    evaluations.append(record)
                    write_line(log, record)
                    if main:
                        save(run, build, config, project, step, improved, last, record)
                    progress.say(
                        f"step {step}: held-out loss {result['loss']:.4f}, {result['bits_per_byte']:.4f} bits per byte"
                        + (" (best)" if improved else "")
                    )
                    waited = time.perf_counter() - before
        finally:
            hook.on_train_end(build=build)
            progress.close()

    seconds = time.perf_counter() - started
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {
        "steps": step,
        "tokens": step * params.batch_tokens,
        "epochs": step * plan.sequences / windows.per_epoch,
        "seconds": seconds,
        "loss": losses[-1]["loss"],
        "best_val_loss": best,
        "tokens_per_second": median(
            [r["tokens_per_second"] for r in losses[1:]] or [losses[0]["tokens_per_second"]]
        ),
        "share_of_peak": median([r.get("share_of_peak", 0.0) for r in losses[1:]] or [0.0]),
        "peak_source": peak_source,
        "peak_memory_gib": peak_memory(accelerator.device) / GIB,
        "losses": losses,
        "evaluations": evaluations,
        "is_main": main,
    }


def optimizer_step(
    build: Build, hook: Any, window: list[tuple[Tensor, Tensor]], grad_clip: float
) -> tuple[Tensor, Tensor]:
    """One optimizer step over a window of micro-batches; return its mean loss on this process and gradient norm.

    window: (x, y) pairs, [B, T] int64 each, on any device. The loss of a micro-batch is a sum over its tokens, divided
    by the tokens of the whole window over all processes, so that the result does not depend on how the window is cut.
    Nothing is read back from the device.
    """
    import torch

    accelerator, model, optimizer = build.accelerator, build.model, build.optimizer
    window_tokens = sum(y.numel() for _, y in window) * accelerator.num_processes
    # accelerate divides by the accumulation steps, and DDP averages over processes: undo both.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / window_tokens
    total = torch.zeros((), device=accelerator.device)
    norm = torch.zeros((), device=accelerator.device)
    for x, y in window:
        x = x.to(accelerator.device, non_blocking=True)
        y = y.to(accelerator.device, non_blocking=True)
        with accelerator.accumulate(model), step_contexts(build, hook):
            loss = model(x, y)
            accelerator.backward(loss * scale)
            total += loss.detach()
            if accelerator.sync_gradients and grad_clip:
                norm = accelerator.clip_grad_norm_(model.parameters(), grad_clip)
            optimizer.step()
            optimizer.zero_grad()
    return total / window_tokens, norm


@contextlib.contextmanager
def step_contexts(build: Build, hook: Any) -> Iterator[None]:
    """Enter what the strategies' step_context hooks return, in plan order."""
    with contextlib.ExitStack() as stack:
        for context in hook.step_context(build=build):
            stack.enter_context(context)
        yield


def make_accelerator(plan: Plan, hook: Any) -> Accelerator:
    """The Accelerator that the plan and its strategies ask for. Raises UserError where the launch does not match."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    accumulation = GradientAccumulationPlugin(
        num_steps=plan["gradient_accumulation_steps"], sync_with_dataloader=False, adjust_scheduler=False
    )
    kwargs: dict[str, Any] = {
        "cpu": plan.profile.device == "cpu",
        "gradient_accumulation_plugin": accumulation,
    }
    for asked in hook.accelerator_kwargs(plan=plan):
        for key, value in asked.items():
            if isinstance(value, list):
                kwargs[key] = [*kwargs.get(key, []), *value]
            elif kwargs.setdefault(key, value) != value:
                raise UserError(
                    f"two strategies disagree on accelerate's {key}: {kwargs[key]!r} and {value!r}"
                )
    kwargs.setdefault("mixed_precision", "no")
    accelerator = Accelerator(**kwargs)
    if accelerator.num_processes != plan.num_processes:
        raise UserError(
            f"hardware.num_processes is {plan.num_processes}, but {accelerator.num_processes} were launched: "
            "make them equal"
        )
    if accelerator.device.type == "cuda":
        # The profile's card, whatever card this is: never spill into system memory, never use more than planned.
        total = torch.cuda.get_device_properties(accelerator.device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, plan.profile.vram_gib * GIB / total), accelerator.device
        )
    return accelerator


def build_training(
    project: Project,
    plan: Plan,
    hook: Any,
    accelerator: Accelerator,
    n_vocab: int,
    say: Callable[[str], None],
) -> Build:
    """Model and optimizer, wrapped by strategies and accelerate, in that order."""
    import torch

    from core.model import build_model

    torch.manual_seed(project.params.seed + accelerator.process_index)  # dropout

    params = project.params.train
    config = ModelConfig.resolve(project.params.model, n_vocab)
    build = Build(
        plan=plan,
        accelerator=accelerator,
        model=build_model(config, project.params.seed),
        lr=params.lr,
        weight_decay=params.weight_decay,
        betas=(params.beta1, params.beta2),
        say=say,
    )
    build.model.to(accelerator.device)
    hook.prepare_model(build=build)
    optimizer = hook.make_optimizer(build=build) or adamw(build)
    check_groups(build.model, optimizer)
    for group in optimizer.param_groups:  # peak rates; a strategy may give each group its own
        group["peak_lr"] = group["lr"]
    build.model, build.optimizer = accelerator.prepare(build.model, optimizer)
    hook.finalize_model(build=build)
    return build


def set_lr(build: Build, params: TrainParams, step: int, share: float) -> float:
    """Set each group's rate for this step; return the first group's."""
    factor = lr_factor(params, step, share)
    for group in build.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return build.optimizer.param_groups[0]["lr"]


class Budget:
    """How long a run lasts: in steps, or in seconds."""

    def __init__(self, steps: int | None, seconds: float | None) -> None:
        self.steps, self.seconds = steps, seconds

    @classmethod
    def of(cls, params: TrainParams) -> Budget:
        if params.max_minutes:
            return cls(None, params.max_minutes * 60)
        steps = params.max_steps or max(1, round((params.max_tokens or 0) / params.batch_tokens))
        return cls(steps, None)

    def spent(self, step: int, seconds: float) -> bool:
        return self.share(step, seconds) >= 1.0

    def share(self, step: int, seconds: float) -> float:
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return seconds / self.seconds if step else 0.0  # at least one step

    def seconds_left(self, step: int, seconds: float) -> float:
        if self.steps is not None:
            return seconds / step * (self.steps - step)
        assert self.seconds is not None
        return max(0.0, self.seconds - seconds)


def check_length(split: TokenShards, block_size: int) -> None:
    """Raise UserError where a split does not hold one window of T + 1 tokens."""
    if not any(len(shard) > block_size for shard in split.shards):
        raise UserError(
            f"the {split.split} tokens, {split.n_tokens:,}, are shorter than one context of {block_size}: add text, or "
            "set a smaller model.block_size"
        )


def check_first_loss(loss: float, vocab_size: int) -> None:
    """Raise UserError where a fresh network is not as unsure as it must be."""
    expected = math.log(vocab_size)
    if not abs(loss - expected) <= FIRST_LOSS_TOLERANCE:  # catches nan too
        raise UserError(
            f"the first loss is {loss:.2f}, a fresh network's is near ln({vocab_size}) = {expected:.2f}: a strategy or "
            "an edit changes the loss or the initial weights"
        )


def save(
    run: Run,
    build: Build,
    config: ModelConfig,
    project: Project,
    step: int,
    improved: bool,
    last: bool,
    record: Any,
) -> None:
    """Write the weights this evaluation earned."""
    model = build.accelerator.unwrap_model(build.model)
    facts = {"step": step, "tokens": record["tokens"], "val_loss": record["val_loss"], "run": run.folder.name}
    for which, wanted in (("best", improved), ("last", last)):
        if wanted:
            save_model(
                run.weights(which), model, config, project.tokens / "tokenizer", {**facts, "weights": which}
            )


def write_line(log: Any, record: dict[str, Any]) -> None:
    if log is not None:
        log.write(json.dumps(record) + "\n")
        log.flush()


def step_line(record: dict[str, Any], seconds_left: float) -> list[str]:
    fields = [
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if "share_of_peak" in record:
        fields.append(f"{record['share_of_peak']:.0%} of peak")
    return [*fields, f"{clock(seconds_left)} left", *card_line(record if "vram_used_gib" in record else {})]


def describe(
    config: ModelConfig, plan: Plan, windows: Windows, budget: Budget, peak: float, peak_source: str
) -> str:
    length = f"{budget.steps} steps" if budget.steps else f"{(budget.seconds or 0) / 60:g} minutes"
    rate = f"{peak / 1e12:.2f} TFLOP/s, {peak_source}" if peak else peak_source
    return (
        f"{config.architecture}, {config.n_params:,} parameters, {plan['dtype']}; {length} of "
        f"{plan.sequences} x {config.block_size} tokens in {plan['gradient_accumulation_steps']} micro-batches of "
        f"{plan['micro_batch']}; {windows.per_epoch * config.block_size:,} tokens per epoch; peak: {rate}"
    )


def peak_memory(device: Any) -> int:
    """Peak memory of this process: reserved on the card, or resident on a CPU [bytes]."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(device)
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", 0) or _max_rss() or info.rss


def _max_rss() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
