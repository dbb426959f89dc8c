"""One run, top to bottom.

accelerate places the model, does mixed precision, accumulation, clipping and launching. Data order, schedule and files
are ours: accelerate's samplers and checkpoints are neither exact nor atomic.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from core.batches import Positions, Windows, micro_batches
from core.errors import PluginError, Stopped, Unsound, UserError
from core.faults import point, spoil
from core.hookspecs import Build, Plan
from core.journal import Journal
from core.keeper import Cursor, Keeper
from core.measure import measure
from core.model_config import ModelConfig
from core.monitor import MemoryWatch, Progress, card_line, clock_time
from core.numbers import Numbers, step_if_finite
from core.optim import adamw, check_groups, lr_factor
from core.params import Params, TrainParams
from core.plan import accelerator_kwargs, call, runtime
from core.project import Project
from core.run import Run
from core.stop import Stop, StopRequested
from core.survive import Survivor
from core.tokenizer import Tokenizer
from core.tokens import TokenShards

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

# A fresh network is nearly uniform: its loss is ln(V) plus half the variance of its logits, some 0.3 nats at most
# with N(0, 0.02) weights. Further away, something is broken.
FIRST_LOSS_TOLERANCE = 1.0


def train(
    project: Project,
    plan: Plan,
    run: Run,
    echo: Callable[[str], None],
    stop: Stop,
    inputs: Callable[[], list[str]] = lambda: [],
) -> dict[str, Any]:
    """Train the plan's model on the project's tokens, from the run's last checkpoint on; return what a report needs.

    Leaves log.jsonl, checkpoints, and the best and last weights in the run's folder. stop: asks for an end. inputs:
    what of the run's inputs has changed since it began. Raises Unsound where the first loss is not near ln(V) or where
    three in a row are no numbers, UserError where the launch does not match the plan, and Stopped, with a checkpoint
    written, where it was asked to stop.
    """
    params, hook = project.params.train, runtime(plan).hook
    shards, held_out = (TokenShards.open(project.tokens, split, verify=True) for split in ("train", "val"))
    tokenizer = project.tokens / "tokenizer"
    accelerator = make_accelerator(plan)
    budget, clock, cursor = Budget.of(params), Clock(), Cursor()
    progress = Progress(budget.steps, echo, enabled=accelerator.is_main_process)
    config = ModelConfig.resolve(project.params.model, shards.manifest["n_vocab"])
    build = build_training(plan, hook, accelerator, config, project.params, progress.say)
    memory = MemoryWatch(accelerator.device, plan, progress.say)
    for split in (shards, held_out):
        check_length(split, config.block_size)
    windows = Windows(shards, config.block_size, project.params.seed)
    bytes_of = Tokenizer.load(tokenizer).token_bytes()
    leave = stop.check if accelerator.num_processes == 1 else nothing

    def inspect() -> None:
        """With a window's gradients in place."""
        if numbers.fp16 and (cursor.step == 0 or (cursor.step + 1) % params.eval_interval == 0):
            numbers.look_for_underflow(cursor.step + 1)

    def evaluate() -> None:
        at_once = min(journal.at_once, survivor.micro_batch)
        measured = measure(
            build.model, accelerator, held_out, bytes_of, at_once, params.eval_tokens, progress.say, leave
        )
        record = journal.evaluation(cursor.step, measured)
        try:
            hook.on_evaluate_end(build=build, step=cursor.step, metrics=record)
        finally:
            journal.write(record)
        progress.say(evaluation_line(record, journal))
        keeper.save(keep_training=not done)
        journal.save_weights(tokenizer, cursor.step, done)

    def log() -> list[str]:
        """The only place that waits for the device. Returns what the progress line shows."""
        step = cursor.step
        loss, grad_norm = numbers.read()
        if step == 1:
            check_first_loss(loss, config.vocab_size)
        record = journal.step(step, loss, lr, grad_norm, clock.lap(step))
        try:
            hook.on_step_end(build=build, step=step, metrics=record)
        finally:
            journal.write(record)
        memory.look(step, record)
        return step_line(record, budget.seconds_left(step, cursor.seconds))

    survivor = Survivor(
        build,
        lambda window: optimizer_step(build, hook, window, params.grad_clip, cursor, leave, inspect),
        cursor,
        plan["micro_batch"],
        memory.forgive,
    )
    journal = Journal(run, config, plan, params.batch_tokens, build, survivor, memory)
    numbers = Numbers(
        build, lambda step: windows.places((step - 1) * plan.sequences, plan.sequences), journal.write
    )
    keeper = Keeper(run, build, cursor, survivor, numbers, journal, params.checkpoint_minutes, inputs)
    keeper.require_room()
    progress.say(describe(config, plan, windows, budget, journal))
    for note in plan.notes:
        progress.say(f"note: {note}")

    with stop:
        try:
            keeper.resume()
            done = budget.spent(cursor.step, cursor.seconds)
            if journal.evaluated == cursor.step:
                journal.save_weights(tokenizer, cursor.step, done)
            share = accelerator.process_index, accelerator.num_processes
            positions = Positions(plan.sequences, survivor.planned, *share, cursor.step)
            batches = micro_batches(windows, positions, plan)
            clock.start(cursor)
            build.model.train()
            point("train.loop")
            with keeper.rescuing():
                while True:
                    if journal.evaluated < cursor.step and (done or cursor.step % params.eval_interval == 0):
                        with clock.aside():
                            evaluate()
                    if done:
                        break
                    leave()
                    point("train.window")
                    lr = set_lr(build, params, cursor.step, budget.share(cursor.step, clock.seconds()))
                    before = cursor.step
                    loss, grad_norm = survivor.step(list(islice(batches, survivor.loads)))
                    assert cursor.step == before + 1, "a window is one step"
                    cursor.seconds = clock.seconds()
                    done = budget.spent(cursor.step, cursor.seconds)
                    numbers.add(cursor.step, loss, grad_norm)

                    evaluating = done or cursor.step % params.eval_interval == 0
                    logging = evaluating or cursor.step == 1 or cursor.step % params.log_interval == 0
                    progress.advance(cursor.step, log() if logging else [], logging)
                    leaving, saving = keeper.together(
                        stop.look() and not keeper.alone, keeper.due() and not evaluating
                    )
                    if leaving:
                        raise StopRequested(stop.requested or "a signal to another process")
                    if saving:
                        with clock.aside():
                            keeper.save()
            journal.require_weights(params.final_weights, cursor.step)
        except StopRequested as request:
            keeper.save(keep_training=False)
            raise Stopped(
                f"stopped by {request} after step {cursor.step}; everything is saved in {run.folder}. Run the same "
                "command again (or `dvc repro`) to go on"
            ) from None
        except RuntimeError as error:
            if not (stop.requested and "DataLoader worker" in str(error)):
                raise  # a signal to the whole group ends the workers too
            raise Stopped(
                f"stopped by {stop.requested} after step {cursor.step}; run the same command again"
            ) from None
        finally:
            journal.close()
            progress.close()
            end_strategies(build)

    accelerator.wait_for_everyone()
    accelerator.end_training()
    return journal.summary(cursor.step * plan.sequences / windows.per_epoch, cursor.seconds, numbers.skipped)


def end_strategies(build: Build) -> None:
    """Tell every strategy that training is over. One that fails hides no error that is on its way already."""
    with contextlib.suppress(Exception) if sys.exc_info()[0] else contextlib.nullcontext():
        for strategy in build.plan.active:
            call(strategy, "on_train_end", build=build)


def nothing() -> None:
    """What is called where nothing has to be."""


def optimizer_step(
    build: Build,
    hook: Any,
    window: list[tuple[Tensor, Tensor]],
    grad_clip: float,
    cursor: Cursor | None = None,
    leave: Callable[[], None] = nothing,
    inspect: Callable[[], None] = nothing,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over a window of micro-batches; return its mean loss on this process and gradient norm.

    window: (x, y) pairs, [B, T] int64 each, on any device. The loss of a micro-batch is a sum over its tokens, divided
    by the tokens of the whole window over all processes, so that the result does not depend on how the window is cut.
    Nothing is read back from the device. A step that is not finite changes no weight.

    cursor: moves with each micro-batch; one in the middle of a window goes on from there. leave: called between two
    micro-batches, may raise. inspect: called with the window's gradients in place.
    """
    import torch

    accelerator, model, optimizer = build.accelerator, build.model, build.optimizer
    cursor = cursor or Cursor()
    window_tokens = sum(y.numel() for _, y in window) * accelerator.num_processes
    # accelerate divides by the accumulation steps, and DDP averages over processes: undo both.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / window_tokens
    total = cursor.loss if cursor.micro_batches else torch.zeros((), device=accelerator.device)
    norm = torch.zeros((), device=accelerator.device)
    for x, y in window[cursor.micro_batches :]:
        leave()
        point("train.micro_batch")
        x = x.to(accelerator.device, non_blocking=True)
        y = y.to(accelerator.device, non_blocking=True)
        with accelerator.accumulate(model):
            with step_contexts(build, hook):
                loss = spoil("step.loss", model(x, y))
                accelerator.backward(loss * scale)
            point("train.backward")
            total += loss.detach()
            cursor.micro_batches, cursor.loss = cursor.micro_batches + 1, total
            if accelerator.sync_gradients:
                first = next(model.parameters())
                first.grad = spoil("step.gradient", first.grad)
                inspect()
                norm = accelerator.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
                point("train.update")
                step_if_finite(build, total, norm)
                cursor.step, cursor.micro_batches, cursor.loss, cursor.random = cursor.step + 1, 0, None, None
                build.updating = False
                point("train.updated")
            optimizer.zero_grad()
    return total / window_tokens, norm


@contextlib.contextmanager
def step_contexts(build: Build, hook: Any) -> Iterator[None]:
    """Enter what the strategies' step_context hooks return, in plan order."""
    with contextlib.ExitStack() as stack:
        for context in hook.step_context(build=build):
            stack.enter_context(context)
        yield


def make_accelerator(plan: Plan, simulated: bool = False) -> Accelerator:
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
    kwargs |= accelerator_kwargs(plan)
    kwargs.setdefault("mixed_precision", "no")
    if simulated and kwargs["mixed_precision"] == "fp16":
        kwargs["mixed_precision"] = "bf16"
    try:
        accelerator = Accelerator(**kwargs)
    except (TypeError, ValueError) as e:
        raise PluginError(f"accelerate refuses what the strategies ask of it: {e}") from e
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
        return cls(params.steps, params.max_minutes and params.max_minutes * 60)

    def spent(self, step: int, seconds: float) -> bool:
        return self.share(step, seconds) >= 1.0

    def share(self, step: int, seconds: float) -> float:
        """Of the budget, at most 1: an evaluation may take what is left of it just before a step."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return min(1.0, seconds / self.seconds) if step else 0.0  # at least one step

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
    """Raises UserError where a fresh network's loss is not near ln(V)."""
    expected = math.log(vocab_size)
    if not abs(loss - expected) <= FIRST_LOSS_TOLERANCE:  # catches nan too
        raise Unsound(
            f"the first loss is {loss:.2f}, a fresh network's is near ln({vocab_size}) = {expected:.2f}: a strategy or "
            "an edit changes the loss or the initial weights"
        )


class Clock:
    """Time spent training, and the rate between log lines without the evaluations."""

    def start(self, cursor: Cursor) -> None:
        """Go on from what earlier lives took."""
        self.lap_started = time.perf_counter()
        self.started = self.lap_started - cursor.seconds
        self.lap_step = cursor.step

    def seconds(self) -> float:
        """Since the start, evaluations included."""
        return time.perf_counter() - self.started

    def lap(self, step: int) -> float:
        """Steps per second since the last lap."""
        now = time.perf_counter()
        rate = (step - self.lap_step) / max(now - self.lap_started, 1e-9)
        self.lap_step, self.lap_started = step, now
        return rate

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens in here is no training: it does not count for the rate."""
        start = time.perf_counter()
        yield
        self.lap_started += time.perf_counter() - start


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
    best = " (best)" if journal.best_step == record["step"] else ""
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
