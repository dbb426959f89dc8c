"""The command line: `tightfit`, and the frame that every stage command shares.

Nothing heavy is imported here, so that `--help` stays fast.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from core import faults
from core.errors import MEDIA_ERRNOS, MediaError, Stopped, TightfitError, UserError, is_out_of_memory
from core.project import Project


class Command(click.Command):
    """Prints a TightfitError as a message and exits with its code; `--debug` shows the traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show a traceback on errors."))

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a cp1252 console cannot print every corpus
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(encoding="utf-8", errors="replace")
        debug = ctx.params.pop("debug")
        try:
            if spec := os.environ.get(faults.VARIABLE):
                faults.arm(spec)
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt, SystemExit) as e:
            problem = None if debug else explain(e)
            if problem is None:
                raise
            click.echo(f"Error: {problem}", err=True)
            ctx.exit(problem.exit_code)


def explain(error: BaseException) -> TightfitError | None:
    """Return what to tell the user about `error`, or None for a bug that deserves its traceback."""
    if isinstance(error, TightfitError):
        return error
    if isinstance(error, SystemExit):  # sys.exit(0) somewhere inside must not look like a finished stage
        return TightfitError(f"the program was ended from inside, by sys.exit({error.code!r})")
    if isinstance(error, KeyboardInterrupt):
        return Stopped("interrupted; nothing was recorded. Run the same command again.")
    if isinstance(error, OSError) and error.errno in MEDIA_ERRNOS:
        where = f" ({error.filename})" if error.filename else ""
        return MediaError(
            f"cannot write{where}: {error.strerror}. Free some room or fix the disk, then run again."
        )
    if isinstance(error, PermissionError):
        return MediaError(
            f"no permission for {error.filename}: {error.strerror}. Close other programs that "
            "have it open, or make it yours."
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return TightfitError(
            f"a data loader's worker died ({str(error).splitlines()[0]}): the machine may be out of RAM. Run again to "
            "go on; hardware.options.loader.workers: 0 does without workers"
        )
    if is_out_of_memory(error):
        what = str(error).partition("\n")[0] or "RAM"
        return UserError(
            f"out of memory ({what}): set a smaller train.micro_batch (the batch stays what it is), model.block_size "
            "or model.preset"
        )
    return None


def say(line: str) -> None:
    """Print a line. Where nobody reads it any more (a closed pipe, a gone terminal), the work goes on in silence."""
    try:
        click.echo(line)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Decorator: a click command that receives the Project it runs in as its first argument."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        def run(**kwargs: Any) -> Any:
            return function(Project.find(), **kwargs)

        run.__doc__ = function.__doc__
        if hasattr(function, "__click_params__"):
            run.__click_params__ = function.__click_params__  # type: ignore[attr-defined]
        return click.command(name, cls=Command)(run)

    return wrap


class LazyGroup(click.Group):
    """A group whose commands are imported when they run, not when `--help` lists them."""

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.lazy:
            return None
        module, _ = self.lazy[name]
        return importlib.import_module(module).main

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in self.lazy.items()])


@click.group(
    cls=LazyGroup,
    lazy={
        "env-check": ("stages.env_check", "Check this machine and resolve the plan."),
        "prepare-data": ("stages.prepare_data", "Read the corpus into documents, split by hash."),
        "tokenize": ("stages.tokenize", "Train the tokenizer and write token shards."),
        "train": ("stages.train", "Train the model that the plan describes."),
        "evaluate": ("stages.evaluate", "Measure the model and write the report."),
        "plan": ("core.commands.plan", "Does it fit, how, and how fast? For any card."),
        "generate": ("core.commands.generate", "Continue a prompt with a trained model."),
        "bench": ("core.commands.bench", "Measure this machine: tightfit bench devices."),
        "params": ("core.commands.params", "Explain every key of params.yaml."),
        "plugins": ("core.commands.plugins", "List, check and create plugins."),
        "runs": ("core.commands.runs", "List, look at and clear runs."),
        "selftest": ("core.commands.selftest", "Rehearse what can go wrong: tightfit selftest --faults."),
    },
)
@click.version_option(package_name="tightfit")
def main() -> None:
    """Pretrain a language model from scratch on the GPU you already have.

    `dvc repro` runs the five stages in order; each also runs alone.
    """
