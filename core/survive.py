"""Out of memory while training: the window is done again in smaller micro-batches, as if they had been planned.

Nothing about the optimisation changes: the same tokens, the same batch, the same random numbers from the start of the
window on. Gradients of a step that failed halfway are dropped, never added to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import UserError, is_out_of_memory
from core.hookspecs import GIB, Build, Plan
from core.measure import free_cached, smaller
from core.monitor import peak_memory
from core.plan import call
from core.snapshot import RandomState


@dataclass
class Survivor:
    """Runs optimizer steps, and gives way where memory runs out."""

    build: Build
    step_function: Callable[[list[tuple[Any, Any]]], Any]
    """One optimizer step over a window of micro-batches; moves the cursor."""
    cursor: Any
    """core.keeper.Cursor."""
    micro_batch: int
    after: Callable[[], None] = lambda: None
    """Called when something was given up."""
    happened: list[dict[str, Any]] = field(default_factory=list)
    """What was given up, for the log: step, micro_batch, strategy, error."""
    climbed: list[str] = field(default_factory=list)
    """Strategies that were switched on."""

    def __post_init__(self) -> None:
        self.planned = self.micro_batch
        self.loads = self.build.plan["gradient_accumulation_steps"]  # of the planned size, whatever is used

    def step(self, window: list[tuple[Any, Any]]) -> Any:
        """Do the cursor's next step over `window`, pairs of [B, T]. Raises UserError where nothing more can give."""
        device, number = self.build.accelerator.device, self.cursor.step + 1
        if not self.cursor.micro_batches:
            self.cursor.random = RandomState.now(device)
        random = self.cursor.random
        while True:
            try:
                return self.step_function(cut(window, self.micro_batch))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0] or type(error).__name__
            # Out here the traceback is gone, and with it the activations that it held.
            self._refuse(number, reason)
            self._back_to_start(random)
            if self.micro_batch > 1:
                self.use(smaller(self.micro_batch), f"out of memory at step {number}")
                self._note(number, reason, f"micro-batch {self.micro_batch}")
            else:
                self._note(number, reason, self._climb(number, reason))

    def use(self, micro_batch: int, reason: str) -> None:
        """Go on with another micro-batch; the batch stays what it is. Between windows only."""
        plan, accelerator = self.build.plan, self.build.accelerator
        steps = plan.sequences // plan.num_processes // micro_batch
        plan.set("micro_batch", micro_batch, reason=reason, by="core")
        plan.set("gradient_accumulation_steps", steps, reason=reason, by="core")
        accelerator.gradient_accumulation_steps = steps
        accelerator.step = 0  # accelerate counts micro-batches, and updates at every multiple of the steps
        self.micro_batch = micro_batch

    def state(self) -> dict[str, Any]:
        """Plain values that `load` takes back."""
        return {"micro_batch": self.micro_batch, "climbed": self.climbed, "happened": self.happened}

    def load(self, state: Mapping[str, Any], same: bool) -> None:
        """Go on with what an earlier life had come down to; not where another micro-batch is planned now."""
        self.happened = list(state["happened"])
        for name in state["climbed"] if same else ():
            if rung := next((s for s in self.build.plan.rungs_left if s.name == name), None):
                self._switch_on(rung)
        if same and state["micro_batch"] != self.micro_batch:
            self.use(state["micro_batch"], "out of memory in an earlier life of this run")

    def _switch_on(self, rung: Any) -> None:
        self.build.plan.rungs_left.remove(rung)
        self.climbed.append(rung.name)
        call(rung, "prepare_model", build=self.build)

    def _refuse(self, number: int, reason: str) -> None:
        """Raise where doing the window again would not give the same run."""
        if self.build.updating:
            raise UserError(
                f"out of memory while the optimizer was changing the weights, at step {number} ({reason}): the run "
                f"cannot go on from there; {remedy(self.build.plan)}"
            )
        if self.build.accelerator.num_processes > 1:
            raise UserError(
                f"out of memory at step {number} in one of several processes ({reason}): the others cannot wait for "
                f"it; set train.micro_batch to {max(1, self.micro_batch // 2)}"
            )

    def _back_to_start(self, random: Any) -> None:
        accelerator = self.build.accelerator
        self.build.model.zero_grad(set_to_none=True)
        self.cursor.micro_batches, self.cursor.loss = 0, None
        accelerator.step = 0
        if accelerator.scaler is not None:  # it remembers that it has unscaled these gradients
            accelerator.scaler._per_optimizer_states.clear()
        free_cached(accelerator.device)
        random.restore(accelerator.device)

    def _climb(self, number: int, reason: str) -> str:
        """Switch on the next rung of the memory ladder that a running model takes; say what it is."""
        plan = self.build.plan
        rung: Any = next((s for s in plan.rungs_left if s.mid_run and s.affects == "execution"), None)
        if rung is None:
            peak = peak_memory(self.build.accelerator.device) / GIB
            predicted = f"{plan.fit.forecast.needed / GIB:.2f} GiB were predicted, " if plan.fit else ""
            raise UserError(
                f"out of memory at step {number} with a micro-batch of 1 ({reason}): {predicted}{peak:.2f} GiB were in "
                f"use at most, of {plan.memory_budget / GIB:.2f} that are the plan's; {remedy(plan)}"
            )
        self._switch_on(rung)
        return f"the strategy {rung.name}"

    def _note(self, number: int, reason: str, change: str) -> None:
        self.happened.append({"step": number, "out_of_memory": reason, "change": change})
        self.after()
        self.build.say(
            f"step {number}: out of memory ({reason}); going on with {change}, the batch stays the same"
        )


def remedy(plan: Plan) -> str:
    return (
        "close what else uses the memory, or set a smaller model.block_size or model.preset "
        f"(`tightfit plan --profile {plan.profile.name}` shows what fits)"
    )


def cut(window: list[tuple[Any, Any]], micro_batch: int) -> list[tuple[Any, Any]]:
    """The window in micro-batches of this size, in the same order. Copies nothing."""
    if window[0][0].shape[0] == micro_batch:
        return window
    return [pair for x, y in window for pair in zip(x.split(micro_batch), y.split(micro_batch), strict=True)]
