"""What a run leaves behind: log.jsonl, the best and last weights, and the figures of its summary."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import MediaError, Unsound, UserError, is_media
from core.faults import point
from core.hookspecs import GIB, Build, Plan
from core.monitor import CardMonitor, MemoryWatch, peak_flops
from core.run import Run, save_model

if TYPE_CHECKING:
    from core.model_config import ModelConfig
    from core.survive import Survivor


class Log:
    """log.jsonl: whole lines only. Where the disk refuses one, training goes on and it is tried again with the next."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.waiting: list[bytes] = []
        self.length = 0
        self.file: Any = None

    def open(self, length: int) -> list[dict[str, Any]]:
        """Keep the first `length` bytes, as a checkpoint remembers them; return their records."""
        self.file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
        kept = self.file.read(length)
        kept = kept[: kept.rfind(b"\n") + 1]
        records, bad = [], 0
        for line in kept.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                bad += 1
        if bad or len(kept) < length:
            self.say(f"warning: {self.path} is damaged: the curves will lack some points; the weights do not")
        self.length = len(kept)
        self.file.seek(self.length)
        self.file.truncate()
        return [
            {key: _unplain(v) for key, v in record.items()} for record in records if isinstance(record, dict)
        ]

    def write(self, record: dict[str, Any]) -> None:
        if self.file is None:  # only the main process has a log
            return
        self.waiting.append(json.dumps(record).encode("utf-8") + b"\n")
        try:
            point("train.log")
            self.file.seek(self.length)
            self.file.truncate()
            text = b"".join(self.waiting)
            if self.file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            if not is_media(e):
                raise
            if len(self.waiting) == 1:
                self.say(
                    f"warning: {self.path}: {e.strerror}; training goes on, the log will be written when it can be"
                )
            return
        self.length += sum(map(len, self.waiting))
        self.waiting = []

    def sync(self) -> int:
        """Wait until it is on the disk; return its length [bytes]."""
        if self.file is not None and not self.waiting:
            with contextlib.suppress(OSError):  # a checkpoint that cannot be written either will say so
                os.fsync(self.file.fileno())
        return self.length

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been told
                self.file.close()


class Journal:
    """The records of a run, and the weights that its evaluations earned."""

    def __init__(
        self,
        run: Run,
        config: ModelConfig,
        plan: Plan,
        batch_tokens: int,
        build: Build,
        survivor: Survivor,
        memory: MemoryWatch,
    ) -> None:
        self.run, self.config, self.batch_tokens, self.build = run, config, batch_tokens, build
        self.survivor, self.memory = survivor, memory
        self.accelerator = build.accelerator
        self.card = CardMonitor(self.accelerator.device)
        self.peak, self.peak_source = peak_flops(plan, self.accelerator.device)
        self.log = Log(run.log, build.say)
        self.losses: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.best, self.best_step = math.inf, 0
        self.evaluated = 0  # the step of the last evaluation
        self.at_once = survivor.micro_batch  # sequences of an evaluation; fewer where memory ran out
        self.told = 0

    def open(self, state: dict[str, Any] | None) -> None:
        """Begin the log, or go on with it where a checkpoint left it."""
        records = (
            self.log.open(state["log_bytes"] if state else 0) if self.accelerator.is_main_process else []
        )
        if state:
            for record in state["unwritten"]:  # the disk refused them in the life that was killed
                self.log.write(record)
            records += [{key: _unplain(v) for key, v in record.items()} for record in state["unwritten"]]
        self.losses = [r for r in records if "tokens_per_second" in r]
        self.evaluations = [r for r in records if "val_loss" in r]
        if state:
            self.best = math.inf if state["best"] is None else state["best"]
            self.best_step, self.evaluated = state["best_step"], state["evaluated"]
            self.at_once, self.told = state["at_once"], state["told"]
            self.losses = (
                self.losses or state["recent"]
            )  # a log that was lost takes the curves with it, not the run
            if self.evaluations[-1:] != state["last_evaluation"]:
                self.evaluations += state["last_evaluation"]
            self.memory.peak = max(self.memory.peak, state["peak_memory"])

    def state(self) -> dict[str, Any]:
        """Plain values that `open` takes back."""
        self._tell()
        best = self.best if math.isfinite(self.best) else None
        return {
            "log_bytes": self.log.sync(),
            "unwritten": [json.loads(line) for line in self.log.waiting],
            "best": best,
            "best_step": self.best_step,
            "evaluated": self.evaluated,
            "at_once": self.at_once,
            "told": self.told,
            "peak_memory": self.memory.read(),
            "recent": self.losses[-5:],
            "last_evaluation": self.evaluations[-1:],
        }

    def step(
        self, step: int, loss: float, lr: float, grad_norm: float, steps_per_second: float
    ) -> dict[str, Any]:
        """The record of a logged step. What is not finite is written as it is, as text: JSON has no such numbers."""
        rate = steps_per_second * self.batch_tokens
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * self.batch_tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": rate,
        }
        if self.peak:
            total = self.peak * self.accelerator.num_processes
            record["share_of_peak"] = rate * self.config.flops_per_token / total
        scaler = self.accelerator.scaler
        record |= {"loss_scale": scaler.get_scale()} if scaler is not None else {}
        record |= self.card.read() | {"memory_gib": self.memory.read() / GIB}
        self.losses.append(record)
        return record

    def evaluation(self, step: int, measured: dict[str, Any]) -> dict[str, Any]:
        """The record of an evaluation. Raises Unsound where the model predicts no numbers any more."""
        if not math.isfinite(measured["loss"]):
            raise Unsound(
                f"the held-out loss is {measured['loss']} at step {step}: the weights have grown out of bounds. Set a "
                "smaller train.lr, or more train.warmup_steps"
            )
        self.evaluated, self.at_once = step, measured["sequences_at_once"]
        if measured["loss"] < self.best:
            self.best, self.best_step = measured["loss"], step
        self.memory.read()
        record = {"step": step, "tokens": step * self.batch_tokens}
        record |= {"val_loss": measured["loss"], "val_bits_per_byte": measured["bits_per_byte"]}
        self.evaluations.append(record)
        return record

    def write(self, record: dict[str, Any]) -> None:
        self._tell()
        self.log.write({key: _plain(value) for key, value in record.items()})

    def _tell(self) -> None:
        """What memory made the run give up, as it happened."""
        for event in self.survivor.happened[self.told :]:
            self.log.write(event)
        self.told = len(self.survivor.happened)

    def close(self) -> None:
        self._tell()
        self.log.close()

    def save_weights(self, tokenizer: Path, step: int, done: bool) -> None:
        """Write the weights that belong to this step, unless they are there: the best so far, the last."""
        if not self.accelerator.is_main_process or not self.evaluations:
            return
        record = self.evaluations[-1]
        assert record["step"] == step, "weights are saved when they have been measured"
        facts = {key: record[key] for key in ("step", "tokens", "val_loss")} | {"run": self.run.folder.name}
        for which, wanted in (("best", self.best_step == step), ("last", done)):
            if wanted and not self.run.holds(which, step):
                folder = self.run.weights(which)
                try:
                    save_model(folder, self.build.network, tokenizer, {**facts, "weights": which})
                except OSError as e:
                    if not is_media(e):
                        raise
                    raise MediaError(
                        f"the {which} weights, of step {step}, cannot be kept in {folder}: {e.strerror}. Make room and "
                        "run again: it goes on from its checkpoint"
                    ) from None

    def require_best(self, step: int) -> None:
        """Raise UserError where a run goes on without the best weights of its past, which cannot be made again."""
        there = self.run.step_of("best")
        if self.best_step and self.best_step < step and (there is None or there < self.best_step):
            raise UserError(
                f"{self.run.weights('best')} should hold the best weights so far, of step {self.best_step}, and "
                f"{'is missing or damaged' if there is None else f'holds those of step {there}'}: put them back, or "
                "begin this run afresh: python -m stages.train --fresh"
            )

    def require_weights(self, which: str, step: int) -> None:
        """Raise UserError where the weights that shall become the final model are not there."""
        wanted = self.best_step if which == "best" else step
        if self.accelerator.is_main_process and not self.run.holds(which, wanted):
            raise UserError(
                f"{self.run.weights(which)} should hold the weights of step {wanted} and does not: put them back, or "
                "begin this run afresh: python -m stages.train --fresh"
            )

    def summary(self, epochs: float, seconds: float, skipped: int) -> dict[str, Any]:
        """The run in figures. loss: mean of the last five logged that are numbers."""
        steady = self.losses[1:] or self.losses  # the first step pays for warming up
        recent = [r["loss"] for r in self.losses if math.isfinite(float(r["loss"]))][-5:]
        last = self.evaluations[-1]
        return {
            "steps": last["step"],
            "tokens": last["tokens"],
            "epochs": epochs,
            "seconds": seconds,
            "loss": sum(recent) / len(recent),
            "best_val_loss": self.best,
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steady),
            "share_of_peak": statistics.median(r.get("share_of_peak", 0.0) for r in steady),
            **self.memory.summary(),
            "micro_batch": self.survivor.micro_batch,
            "out_of_memory": len(self.survivor.happened),
            "skipped_steps": skipped,
            "losses": self.losses,
            "evaluations": self.evaluations,
        }


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity: those are written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _unplain(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
