"""When numbers go bad: noticed on the device without waiting for it, never stepped, told as they are.

A step whose loss or gradient is not finite changes no weight: the fused optimizers skip it on the device itself, as
they do for a GradScaler (torch.optim.Optimizer's found_inf). The figures are read when a step is logged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from core.errors import Unsound

if TYPE_CHECKING:
    from torch import Tensor

    from core.hookspecs import Build

IN_A_ROW = 3
WATCHED = 100
"""fp16: steps over which skipped ones are counted."""
SCALE_STEPS = 20
UNDERFLOW = 0.01
"""Share of a matrix's gradient that may be exactly zero in fp16; in fp32 hardly any is."""


def step_if_finite(build: Build, loss: Tensor, norm: Tensor) -> None:
    """build.optimizer.step(), which changes nothing where the window's loss or gradient norm is not finite.

    Nothing is read from the device, but for an optimizer that cannot skip by itself: there, one value is. Sets
    build.updating; the caller takes it back once the step is counted.
    """
    accelerator, optimizer = build.accelerator, build.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    if accelerator.scaler is not None:  # the scaler looks at every gradient itself
        build.updating = True
        optimizer.step()
        return
    bad = 1.0 - (loss.isfinite() & norm.isfinite()).float()
    if accelerator.num_processes > 1:  # all of them skip, or none
        bad = accelerator.reduce(bad, "sum").clamp(max=1.0)
    if getattr(inner, "_step_supports_amp_scaling", False):
        inner.grad_scale, inner.found_inf = None, bad
        build.updating = True
        optimizer.step()
        del inner.grad_scale, inner.found_inf
    elif build.simulated or not bad.item():
        build.updating = True
        optimizer.step()


class Numbers:
    """The losses and gradient norms of the steps since the last log line, still on the device, and what was skipped."""

    def __init__(
        self, build: Build, where: Callable[[int], list[str]], write: Callable[[dict[str, Any]], None]
    ) -> None:
        """where: step → where its text lies; write: takes a record for the log."""
        self.build, self.where, self.write = build, where, write
        self.recent: list[tuple[int, Any, Any]] = []
        self.skipped = self.in_a_row = self.small_scale = 0
        self.overflowed: list[int] = []
        self.fp16 = build.accelerator.scaler is not None

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self.recent.append((step, loss, norm))

    def read(self) -> tuple[float, float]:
        """Wait for the device; return the last step's loss and gradient norm. Skipped steps are told and written.

        Raises Unsound where too many were skipped to go on.
        """
        import torch

        if not self.recent:
            return math.nan, math.nan
        values = torch.stack([torch.stack((loss.float(), norm.float())) for _, loss, norm in self.recent])
        values = self.build.accelerator.reduce(values, "sum")
        steps = [step for step, _, _ in self.recent]
        self.recent = []
        for step, (loss, norm) in zip(steps, values.tolist(), strict=True):
            norm /= self.build.accelerator.num_processes  # it is the same in each
            self._count(step, loss, norm)
        if self.fp16:
            self._watch_scale(step)
        return loss, norm

    def _count(self, step: int, loss: float, norm: float) -> None:
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        if self.fp16:
            self.overflowed = [*self.overflowed[1 - WATCHED :], int(bad)]
        if not bad:
            self.in_a_row = 0
            return
        self.skipped += 1
        places = self.where(step)
        self.write({"step": step, "skipped": True, "loss": loss, "grad_norm": norm, "tokens_at": places})
        if self.fp16 and math.isfinite(
            loss
        ):  # a scaler tries scales that are too large: nothing is wrong yet
            self.in_a_row = 0
            return
        self.in_a_row += 1
        text = ", ".join(places[:3]) + (" … (all in log.jsonl)" if len(places) > 3 else "")
        self.build.say(
            f"warning: step {step}: loss {loss}, gradient norm {norm}: not stepped. Its text: {text}"
        )
        if self.in_a_row >= IN_A_ROW:
            raise Unsound(
                f"loss or gradients are not finite in {IN_A_ROW} steps in a row, up to step {step} (its text: {text}). "
                "The weights are those before. Set a smaller train.lr, more train.warmup_steps, or another precision "
                "(hardware.strategies)"
            )

    def _watch_scale(self, step: int) -> None:
        scale = self.build.accelerator.scaler.get_scale()
        self.small_scale = self.small_scale + 1 if scale < 1.0 else 0
        skipped = sum(self.overflowed)
        if 2 * skipped > WATCHED or (scale < 1.0 and sum(self.overflowed[-SCALE_STEPS:]) == SCALE_STEPS):
            raise Unsound(
                f"step {step}: fp16's loss scale fell to {scale:g}, and {skipped} of the last {len(self.overflowed)} "
                "steps were skipped: gradients overflow. Set a smaller train.lr, or train in bf16 or fp32 "
                "(hardware.strategies.remove: [fp16])"
            )
        if self.small_scale == 1:
            self.build.say(
                f"warning: step {step}: fp16's loss scale fell to {scale:g}: small gradients vanish"
            )

    def look_for_underflow(self, step: int) -> None:
        """Warn where gradients vanish in fp16. Called with a window's gradients in place; reads from the device."""
        import torch

        embeddings = {
            id(m.weight) for m in self.build.network.modules() if isinstance(m, torch.nn.Embedding)
        }  # rows of words that did not occur
        shares = {
            name: (p.grad == 0).float().mean()
            for name, p in self.build.network.named_parameters()
            if p.dim() > 1 and p.grad is not None and id(p) not in embeddings
        }
        zero = {name: share.item() for name, share in shares.items()}
        if (worst := max(zero, key=zero.__getitem__)) and zero[worst] > UNDERFLOW:
            many = sum(share > UNDERFLOW for share in zero.values())
            self.build.say(
                f"warning: step {step}: {zero[worst]:.1%} of {worst}'s gradient is exactly zero, and over "
                f"{UNDERFLOW:.0%} in {many} of {len(zero)} matrices: fp16 loses small gradients. Train in bf16 or "
                "fp32, or set a larger hardware.options.fp16.init_scale"
            )

    def state(self) -> dict[str, Any]:
        """Plain values; call `read` first."""
        assert not self.recent
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "overflowed": self.overflowed,
            "small_scale": self.small_scale,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.overflowed, self.small_scale = list(state["overflowed"]), state["small_scale"]
