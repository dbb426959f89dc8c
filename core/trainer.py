"""One run, top to bottom.

accelerate places the model, does mixed precision, accumulation, clipping and launching. Data order, schedule and files
are ours: accelerate's samplers and checkpoints are neither exact nor atomic.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from core.batches import Positions, Windows, micro_batches
from core.errors import UserError
from core.hookspecs import GIB, Build, Plan
from core.measure import measure
from core.model_config import ModelConfig
from core.monitor import CardMonitor, MemoryWatch, Progress, card_line, clock_time, peak_flops
from core.optim import adamw, check_groups, lr_factor
from core.params import Params, TrainParams
from core.plan import runtime
from core.project import Project
from core.run import Run, save_model
from core.survive import Survivor
from core.tokenizer import Tokenizer
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
    near ln(V), where a later one is no number, or where the launch does not match the plan.
    """
    params, hook = project.params.train, runtime(plan).hook
    shards, held_out = TokenShards.open(project.tokens, "train"), TokenShards.open(project.tokens, "val")
    accelerator = make_accelerator(plan, hook)
    budget, clock = Budget.of(params), Clock()
    progress = Progress(budget.steps, echo, enabled=accelerator.is_main_process)
    config = ModelConfig.resolve(project.params.model, shards.manifest["n_vocab"])
    build = build_training(plan, hook, accelerator, config, project.params, progress.say)
    memory = MemoryWatch(accelerator.device, plan, progress.say)
    for split in (shards, held_out):
        check_length(split, config.block_size)
    windows = Windows(shards, config.block_size, project.params.seed)
    positions = Positions(
        plan.sequences, plan["micro_batch"], accelerator.process_index, accelerator.num_processes
    )
    batches, micro_batches_read = micro_batches(windows, positions, plan), plan["gradient_accumulation_steps"]
    survivor = Survivor(
        build,
        lambda window: optimizer_step(build, hook, window, params.grad_clip),
        plan["micro_batch"],
        memory.forgive,
    )
    measured_at_once = plan["micro_batch"]
    journal = Journal(run, config, plan, params, accelerator, survivor, memory)
    bytes_of = Tokenizer.load(project.tokens / "tokenizer").token_bytes()
    progress.say(describe(config, plan, windows, budget, journal))
    for note in plan.notes:
        progress.say(f"note: {note}")

    step, done = 0, False
    clock.start()
    build.model.train()
    with journal:
        try:
            while not done:
                lr = set_lr(build, params, step, budget.share(step, clock.seconds()))
                window = list(islice(batches, micro_batches_read))
                step += 1
                loss, grad_norm = survivor.step(window, step)
                done = budget.spent(step, clock.seconds())

                evaluating = done or step % params.eval_interval == 0
                logging = evaluating or step == 1 or step % params.log_interval == 0
                fields = []
                if logging:  # the only place that waits for the device
                    value = check_loss(accelerator.reduce(loss, "sum").item(), step, config.vocab_size)
                    record = journal.step(step, value, lr, grad_norm, clock.lap(step))
                    hook.on_step_end(build=build, step=step, metrics=record)
                    journal.write(record)
                    memory.look(step, record)
                    fields = step_line(record, budget.seconds_left(step, clock.seconds()))
                progress.advance(step, fields, logging)

                if evaluating:
                    measured = measure(
                        build.model,
                        accelerator,
                        held_out,
                        bytes_of,
                        min(measured_at_once, survivor.micro_batch),
                        params.eval_tokens,
                        progress.say,
                    )
                    measured_at_once = measured["sequences_at_once"]
                    record = journal.evaluation(step, measured)
                    hook.on_evaluate_end(build=build, step=step, metrics=record)
                    journal.write(record)
                    journal.save(build, project, record, done)
                    progress.say(evaluation_line(record, journal))
                    clock.skip()
        finally:
            hook.on_train_end(build=build)
            progress.close()

    accelerator.wait_for_everyone()
    accelerator.end_training()
    return journal.summary(step * plan.sequences / windows.per_epoch, clock.seconds())


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
        with accelerator.accumulate(model):
            with step_contexts(build, hook):
                loss = model(x, y)
                accelerator.backward(loss * scale)
            total += loss.detach()
            if accelerator.sync_gradients and grad_clip:
                norm = accelerator.clip_grad_norm_(model.parameters(), grad_clip)
            build.updating = accelerator.sync_gradients
            optimizer.step()
            build.updating = False
            optimizer.zero_grad()
    return total / window_tokens, norm


@contextlib.contextmanager
def step_contexts(build: Build, hook: Any) -> Iterator[None]:
    """Enter what the strategies' step_context hooks return, in plan order."""
    with contextlib.ExitStack() as stack:
        for context in hook.step_context(build=build):
            stack.enter_context(context)
        yield


def make_accelerator(plan: Plan, hook: Any, simulated: bool = False) -> Accelerator:
    """The Accelerator that the plan and its strategies ask for. Raises UserError where the launch does not match.

    simulated: fp16, which a CPU does not have, becomes bf16, which is as wide.
    """
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
    if simulated and kwargs["mixed_precision"] == "fp16":
        kwargs["mixed_precision"] = "bf16"
    accelerator = Accelerator(**kwargs)
    if accelerator.num_processes != plan.num_processes:
        raise UserError(
            f"hardware.num_processes is {plan.num_processes}, but {accelerator.num_processes} were launched: "
            "make them equal"
        )
    if accelerator.device.type != plan.profile.device:
        raise UserError(
            f"the plan wants {plan.profile.device}, torch offers {accelerator.device.type}: run `tightfit env-check`, "
            "and restart the machine if it finds the card"
        )
    if accelerator.device.type == "cuda":
        # No more than the profile's card has, whatever card this is. By index: accelerate's device may have none.
        index = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(index)
        # Windows would rather move memory into RAM than fail, many times slower: better to fail, and to give way.
        torch.cuda.set_per_process_memory_fraction(min(free, plan.memory_budget) / total, index)
    return accelerator


def build_training(
    plan: Plan,
    hook: Any,
    accelerator: Accelerator,
    config: ModelConfig,
    params: Params,
    say: Callable[[str], None],
    simulated: bool = False,
) -> Build:
    """Model and optimizer, wrapped by strategies and accelerate, in that order."""
    import torch

    from core.model import build_model

    torch.manual_seed(params.seed + accelerator.process_index)  # dropout

    network = build_model(config, params.seed)
    build = Build(
        plan=plan,
        accelerator=accelerator,
        network=network,
        model=network,
        lr=params.train.lr,
        weight_decay=params.train.weight_decay,
        betas=(params.train.beta1, params.train.beta2),
        say=say,
        simulated=simulated,
    )
    hook.prepare_model(build=build)
    build.model.to(accelerator.device)
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


def check_loss(loss: float, step: int, vocab_size: int) -> float:
    """Return the loss. Raises UserError where it is no number, or where the first one is not near ln(V)."""
    expected = math.log(vocab_size)
    if step == 1 and not abs(loss - expected) <= FIRST_LOSS_TOLERANCE:  # catches nan too
        raise UserError(
            f"the first loss is {loss:.2f}, a fresh network's is near ln({vocab_size}) = {expected:.2f}: a strategy or "
            "an edit changes the loss or the initial weights"
        )
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step}: set a smaller train.lr, more train.warmup_steps, or another precision "
            "(hardware.strategies)"
        )
    return loss


class Clock:
    """Time spent training, and the rate between log lines without the evaluations."""

    def start(self) -> None:
        self.started = self.lap_started = time.perf_counter()
        self.lap_step = 0

    def seconds(self) -> float:
        """Since the start, evaluations included."""
        return time.perf_counter() - self.started

    def lap(self, step: int) -> float:
        """Steps per second since the last lap."""
        now = time.perf_counter()
        rate = (step - self.lap_step) / max(now - self.lap_started, 1e-9)
        self.lap_step, self.lap_started = step, now
        return rate

    def skip(self) -> None:
        """What happened since the last lap was no training."""
        self.lap_started = time.perf_counter()


class Journal:
    """What a run leaves behind: log.jsonl, the best and last weights, and the figures of its summary."""

    def __init__(
        self,
        run: Run,
        config: ModelConfig,
        plan: Plan,
        params: TrainParams,
        accelerator: Accelerator,
        survivor: Survivor,
        memory: MemoryWatch,
    ) -> None:
        self.run, self.config, self.params, self.accelerator = run, config, params, accelerator
        self.survivor, self.memory = survivor, memory
        self.card = CardMonitor(accelerator.device)
        self.peak, self.peak_source = peak_flops(plan, accelerator.device)
        self.losses: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.best = math.inf
        self.improved = False
        self.log: Any = None
        self.told = 0

    def __enter__(self) -> Journal:
        if self.accelerator.is_main_process:
            self.log = self.run.log.open("w", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, *error: object) -> None:
        self._tell()
        if self.log is not None:
            self.log.close()

    def step(
        self, step: int, loss: float, lr: float, grad_norm: Tensor, steps_per_second: float
    ) -> dict[str, Any]:
        """The record of a logged step."""
        rate = steps_per_second * self.params.batch_tokens
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * self.params.batch_tokens,
            "loss": loss,
            "lr": lr,
        }
        norm = grad_norm.item()
        record["grad_norm"] = (
            norm if math.isfinite(norm) else None
        )  # fp16's scaler skips a step that overflows
        record["tokens_per_second"] = rate
        if self.peak:
            total = self.peak * self.accelerator.num_processes
            record["share_of_peak"] = rate * self.config.flops_per_token / total
        record |= self.card.read() | {"memory_gib": self.memory.read() / GIB}
        self.losses.append(record)
        return record

    def evaluation(self, step: int, measured: dict[str, Any]) -> dict[str, Any]:
        """The record of an evaluation; notes whether it is the best so far."""
        self.improved = measured["loss"] < self.best
        self.best = min(self.best, measured["loss"])
        self.memory.read()
        record = {"step": step, "tokens": step * self.params.batch_tokens}
        record |= {"val_loss": measured["loss"], "val_bits_per_byte": measured["bits_per_byte"]}
        self.evaluations.append(record)
        return record

    def write(self, record: dict[str, Any]) -> None:
        self._tell()
        self._line(record)

    def _tell(self) -> None:
        """What memory made the run give up, as it happened."""
        for event in self.survivor.happened[self.told :]:
            self._line(event)
        self.told = len(self.survivor.happened)

    def _line(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(json.dumps(record) + "\n")
            self.log.flush()

    def save(self, build: Build, project: Project, record: dict[str, Any], done: bool) -> None:
        """Write the weights that this evaluation earned."""
        if not self.accelerator.is_main_process:
            return
        facts = {key: record[key] for key in ("step", "tokens", "val_loss")} | {"run": self.run.folder.name}
        for which, wanted in (("best", self.improved), ("last", done)):
            if wanted:
                tokenizer = project.tokens / "tokenizer"
                save_model(self.run.weights(which), build.network, tokenizer, {**facts, "weights": which})

    def summary(self, epochs: float, seconds: float) -> dict[str, Any]:
        """The run in figures. loss: mean of the last five logged."""
        steady = self.losses[1:] or self.losses  # the first step pays for warming up
        recent = [r["loss"] for r in self.losses[-5:]]
        return {
            "steps": self.losses[-1]["step"],
            "tokens": self.losses[-1]["tokens"],
            "epochs": epochs,
            "seconds": seconds,
            "loss": sum(recent) / len(recent),
            "best_val_loss": self.best,
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steady),
            "share_of_peak": statistics.median(r.get("share_of_peak", 0.0) for r in steady),
            **self.memory.summary(),
            "micro_batch": self.survivor.micro_batch,
            "out_of_memory": len(self.survivor.happened),
            "losses": self.losses,
            "evaluations": self.evaluations,
        }


def step_line(record: dict[str, Any], seconds_left: float) -> list[str]:
    fields = [
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if "share_of_peak" in record:
        fields.append(f"{record['share_of_peak']:.0%} of peak")
    return [*fields, f"{clock_time(seconds_left)} left", *card_line(record)]


def evaluation_line(record: dict[str, Any], journal: Journal) -> str:
    best = " (best)" if journal.improved else ""
    return (
        f"step {record['step']}: held-out loss {record['val_loss']:.4f}, "
        f"{record['val_bits_per_byte']:.4f} bits per byte{best}"
    )


def describe(config: ModelConfig, plan: Plan, windows: Windows, budget: Budget, journal: Journal) -> str:
    length = f"{budget.steps} steps" if budget.steps else f"{(budget.seconds or 0) / 60:g} minutes"
    rate = f"{journal.peak / 1e12:.2f} TFLOP/s, " if journal.peak else ""
    return (
        f"{config.architecture}, {config.n_params:,} parameters, {plan['dtype']}; {length} of "
        f"{plan.sequences} x {config.block_size} tokens in {plan['gradient_accumulation_steps']} micro-batches of "
        f"{plan['micro_batch']}; {windows.per_epoch * config.block_size:,} tokens per epoch; peak: {rate}"
        f"{journal.peak_source}"
    )
