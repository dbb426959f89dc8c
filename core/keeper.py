"""Keeps a run: when a checkpoint is written, what is in it, and how a killed run goes on from there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core import checkpoint
from core.errors import MediaError, Unsound, is_media
from core.journal import Journal
from core.numbers import Numbers
from core.plan import load_state, saved_state
from core.run import Run, differences
from core.snapshot import RandomState, capture, restore, unnamed
from core.stop import StopRequested
from core.survive import Survivor

if TYPE_CHECKING:
    from torch import Tensor

    from core.hookspecs import Build


@dataclass
class Cursor:
    """Where a run stands: so many steps done, and so many micro-batches of the next."""

    step: int = 0
    micro_batches: int = 0
    loss: Tensor | None = None
    """Summed over the micro-batches that are done."""
    random: RandomState | None = None
    """Random states when the step in progress began."""
    seconds: float = 0.0
    """Trained so far, over all lives."""


class Keeper:
    """Saves and resumes one run. Every process has one; the main process writes."""

    def __init__(
        self,
        run: Run,
        build: Build,
        cursor: Cursor,
        survivor: Survivor,
        numbers: Numbers,
        journal: Journal,
        minutes: float,
        inputs: Callable[[], list[str]],
    ) -> None:
        self.run, self.build, self.cursor, self.survivor = run, build, cursor, survivor
        self.numbers, self.journal, self.inputs = numbers, journal, inputs
        self.interval, self.saved_at = minutes * 60, time.monotonic()
        self.main = build.accelerator.is_main_process
        self.alone = build.accelerator.num_processes == 1
        self.execution = execution(build)
        self.warned: list[str] = []

    # --- saving -----------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether so much time has passed that a checkpoint should be written."""
        return time.monotonic() - self.saved_at > self.interval

    def together(self, *flags: bool) -> list[bool]:
        """For each flag, whether any of the processes raises it; the same answers in each."""
        if self.alone:
            return list(flags)
        import torch

        told = torch.tensor([float(flag) for flag in flags], device=self.build.accelerator.device)
        return [bool(raised) for raised in self.build.accelerator.reduce(told, "sum").tolist()]

    def save(self, keep_training: bool = True) -> None:
        """Write a checkpoint of this moment. On a full or failing disk: warn and go on, or raise MediaError.

        Raises Unsound where the weights are not finite: such a checkpoint would never be good again.
        """
        tensors, state = self._contents()
        self.saved_at = time.monotonic()
        if not self.main:
            return
        self.run.folder.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
        c = self.cursor
        try:
            checkpoint.save(
                self.run.folder, c.step, c.micro_batches * self.survivor.micro_batch, tensors, state
            )
        except OSError as e:
            if not is_media(e):
                raise
            problem = (
                f"no checkpoint of step {c.step} in {self.run.folder}: {e.strerror}; it needs "
                f"{checkpoint.size(tensors):,} bytes, {self.run.free():,} are free"
            )
            if not keep_training:
                raise MediaError(f"{problem}. The one before is intact: make room, and run again") from None
            self.build.say(f"warning: {problem}. The one before is intact; training goes on and tries again")
        for change in self.inputs():
            if change not in self.warned:
                self.warned.append(change)
                self.build.say(
                    f"warning: {change} while this run trains: put it back, or its result will be refused"
                )

    @contextlib.contextmanager
    def rescuing(self) -> Iterator[None]:
        """Where an error ends the run in here, save it first, as it was when the step that failed began.

        Not while the optimizer was changing the weights, and not with several processes.
        """
        try:
            yield
        except (StopRequested, Unsound):
            raise
        except Exception:
            c = self.cursor
            if not self.build.updating and self.alone:
                with contextlib.suppress(Exception):  # the error that is on its way matters more
                    c.micro_batches, c.loss = 0, None
                    if c.random is not None:
                        c.random.restore(self.build.accelerator.device)
                    self.build.model.zero_grad(set_to_none=True)
                    self.save(keep_training=False)
                    self.build.say(f"step {c.step} is saved")
            raise

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        import torch

        c = self.cursor
        tensors, state = capture(self.build)
        # Smallest and largest: isfinite() would need a byte per weight, which a full card may not have.
        ends = [torch.stack(t.aminmax()) for name, t in tensors.items() if name.startswith("model/")]
        if not torch.stack([e.float() for e in ends]).isfinite().all():
            raise Unsound(
                f"the weights are not finite at step {c.step}: set a smaller train.lr. Checkpoints of before are in "
                f"{self.run.folder}"
            )
        if c.micro_batches:
            assert c.loss is not None and c.random is not None
            tensors |= {"window/loss": c.loss, **c.random.tensors("window/random")}
        tensors |= self._random_states()
        self.numbers.read()
        strategies: dict[str, Any] = {}
        for name, kept in saved_state(self.build.plan, self.build).items():
            strategies[name] = {
                key: value for key, value in kept.items() if not isinstance(value, torch.Tensor)
            }
            tensors |= {f"strategy/{name}/{k}": v for k, v in kept.items() if isinstance(v, torch.Tensor)}
        state |= {
            "identity": self.run.identity,
            "execution": self.execution,
            "micro_batches": c.micro_batches,
            "seconds": c.seconds,
            "survivor": self.survivor.state(),
            "numbers": self.numbers.state(),
            "strategies": strategies,
            "journal": self.journal.state(),
        }
        return tensors, state

    def _random_states(self) -> dict[str, Tensor]:
        """Those of all processes."""
        accelerator = self.build.accelerator
        mine = RandomState.now(accelerator.device).tensors("random/0")
        if self.alone:
            return mine
        found: dict[str, Tensor] = {}
        for name, tensor in mine.items():
            everyone = accelerator.gather(tensor.to(accelerator.device).unsqueeze(0)).cpu()
            found |= {name.replace("/0/", f"/{rank}/"): row for rank, row in enumerate(everyone)}
        return found

    def require_room(self) -> None:
        """Raise MediaError where the disk cannot hold what this run will write."""
        if not self.main:
            return
        tensors, _ = capture(self.build)
        weights = [t for name, t in tensors.items() if name.startswith("model/")]
        model = sum(t.numel() * t.element_size() for t in weights)
        optimizer_makes = 0 if len(tensors) > len(weights) else 2 * model
        gradients = model  # of an unfinished window
        # best, last and models/final, and one more while it is replaced
        checkpoint.require_room(
            self.run.folder, checkpoint.size(tensors) + optimizer_makes + gradients, 4 * model
        )

    # --- resuming ---------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Put back the newest checkpoint that can be used, and say what is different; False where there is none.

        Raises UserError where there are checkpoints and none is good: a run never starts afresh by itself.
        """
        if self.main:
            self.run.clean()
            found = checkpoint.newest(self.run.folder, self._differences, self.build.say)
        self.build.accelerator.wait_for_everyone()
        if not self.main:
            found = checkpoint.newest(self.run.folder, self._differences, lambda line: None)
        if found is None:
            self.journal.open(None)
            return False
        rest, state = restore(self.build, found), found.state
        self._say_execution(state["execution"])
        c, device = self.cursor, self.build.accelerator.device
        c.step, c.seconds = state["step"], state["seconds"]
        self.numbers.load(state["numbers"])
        self.journal.open(state["journal"])
        same = state["execution"]["micro_batch"] == self.execution["micro_batch"]
        self.survivor.load(state["survivor"], same)
        states = {
            name: values | unnamed(f"strategy/{name}", rest) for name, values in state["strategies"].items()
        }
        for name in load_state(self.build.plan, self.build, states):
            self.build.say(f"note: the strategy {name} kept something in the checkpoint and is off now")
        self.journal.require_best(c.step)
        mine = RandomState.of(rest, f"random/{self.build.accelerator.process_index}")
        one_then_as_now = self.alone and state["execution"]["num_processes"] == 1
        same_cut = self.survivor.micro_batch == state["survivor"]["micro_batch"]
        if state["micro_batches"] and one_then_as_now and same_cut:
            c.micro_batches, c.loss = state["micro_batches"], rest["window/loss"].to(device)
            c.random = RandomState.of(rest, "window/random")
            self.build.accelerator.step = c.micro_batches
        elif state["micro_batches"]:  # cut differently: the window begins again
            self.build.model.zero_grad(set_to_none=True)
            if self.main:  # the others have masks of their own
                mine = RandomState.of(rest, "window/random")
        within = f" and {c.micro_batches} micro-batches" if c.micro_batches else ""
        self.build.say(f"going on after step {c.step}{within} ({found.path.name})")
        self.journal.log.write({"step": c.step, "resumed": True})
        if mine:
            mine.restore(device)  # last: everything above may have drawn numbers
        return True

    def _differences(self, state: Mapping[str, Any]) -> list[str]:
        return differences(state.get("identity", {}), self.run.identity)

    def _say_execution(self, before: Mapping[str, Any]) -> None:
        changed = [
            f"{key} {before.get(key)} → {value}"
            for key, value in self.execution.items()
            if before.get(key) != value
        ]
        if changed:
            self.build.say(
                f"note: this run began with another execution ({'; '.join(changed)}): the same batches and the same "
                "recipe, but sums may round differently"
            )


def execution(build: Build) -> dict[str, Any]:
    """What does not change the numbers beyond rounding: bit-exactness holds while these are equal."""
    import torch

    plan, device = build.plan, build.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "micro_batch": plan["micro_batch"],
        "num_processes": plan.num_processes,
        "num_workers": plan["num_workers"],
        "strategies": [s.name for s in plan.active if s.affects == "execution"],
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
