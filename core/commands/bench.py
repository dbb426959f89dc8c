"""`tightfit bench devices`: the exercises of d2l's chapter on GPUs, measured on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from core.cli import Command

if TYPE_CHECKING:
    import torch

NO_GPU, ONE_GPU = "no GPU here", "one GPU only"
LARGE, SMALL, LOGGED = 2048, 64, 100  # rows of the square matrices
COPY_MIB = 64


@dataclass(frozen=True)
class Row:
    """One way of doing something, and another."""

    what: str
    measured: str
    ratio: float | None = None
    """Time of the first way / time of the second."""


@click.group("bench")
def main() -> None:
    """Measure this machine."""


@click.command("devices", cls=Command)
def devices() -> None:
    """CPU against GPU, one result at a time against all at once, copies, one GPU against two."""
    import torch

    from core.hardware import try_all_gpus
    from core.memory.compute import gpu_problem

    problem = gpu_problem()
    gpus = [] if problem else [gpu for gpu in try_all_gpus() if gpu.type == "cuda"]
    click.echo(f"torch {torch.__version__}, CPU with {torch.get_num_threads()} threads")
    for gpu in gpus:
        click.echo(f"{gpu}: {torch.cuda.get_device_name(gpu)}")
    if problem:
        click.echo(f"{NO_GPU}: {problem}")
    click.echo()
    click.echo(table(measure(gpus)))
    click.echo(
        "\nratio: above 1 the second way is faster. Medians of 5, fp32. Logged is each product's norm."
    )


main.add_command(devices)


def measure(gpus: list[torch.device]) -> list[Row]:
    """Every row of the table on the CPU and `gpus`."""
    import torch

    cpu = torch.device("cpu")
    return [
        products(LARGE, 1, cpu, gpus),
        products(SMALL, 100, cpu, gpus),
        logging(cpu, "CPU"),
        logging(gpus[0], "GPU") if gpus else Row(_logging_title("GPU"), NO_GPU),
        copies(gpus),
        two_gpus(gpus),
    ]


def products(n: int, times: int, cpu: torch.device, gpus: list[torch.device]) -> Row:
    """Large products are the GPU's; small ones cost it more to start than to compute."""
    what = f"{times} x matmul {n} x {n}: CPU / GPU"
    on_cpu = seconds(_multiply(n, times, cpu), cpu)
    if not gpus:
        return Row(what, f"{_ms(on_cpu)} / {NO_GPU}")
    return _compare(what, on_cpu, seconds(_multiply(n, times, gpus[0]), gpus[0]))


def logging(device: torch.device, name: str) -> Row:
    """Reading a result makes the CPU wait for it, so a GPU idles between two products."""
    import torch

    a = torch.randn(LOGGED, LOGGED, device=device)

    def one_by_one() -> None:
        log: list[float] = []
        for _ in range(1000):
            log.append((a @ a).norm().item())

    def on_the_device() -> None:
        log = [(a @ a).norm() for _ in range(1000)]
        torch.stack(log).tolist()

    return _compare(_logging_title(name), seconds(one_by_one, device), seconds(on_the_device, device))


def _logging_title(name: str) -> str:
    return f"1000 x matmul {LOGGED} x {LOGGED} on the {name}: log each / log at the end"


def copies(gpus: list[torch.device]) -> Row:
    """Pinned memory stays where it is, so the card fetches it by itself; pageable is copied once more."""
    import torch

    what = f"copy {COPY_MIB} MiB to the GPU: pageable / pinned"
    if not gpus:
        return Row(what, NO_GPU)
    pageable = torch.ones(COPY_MIB << 18)
    pinned = pageable.pin_memory()
    target = torch.empty_like(pageable, device=gpus[0])

    def copy(source: torch.Tensor) -> float:
        return seconds(lambda: target.copy_(source, non_blocking=True), gpus[0])

    return _compare(what, copy(pageable), copy(pinned))


def two_gpus(gpus: list[torch.device]) -> Row:
    """Kernels start without waiting, so two cards compute at once from one Python thread."""
    what = f"20 x matmul {LARGE} x {LARGE}: one GPU / two GPUs"
    if len(gpus) < 2:
        return Row(what, ONE_GPU if gpus else NO_GPU)
    first, second = (_multiply(LARGE, 10, gpu) for gpu in gpus[:2])

    def in_turn() -> None:
        first()
        first()

    def at_once() -> None:
        first()
        second()

    return _compare(what, seconds(in_turn, gpus[0]), seconds(at_once, *gpus[:2]))


def _multiply(n: int, times: int, device: torch.device) -> Callable[[], None]:
    import torch

    a = torch.randn(n, n, device=device)

    def multiply() -> None:
        for _ in range(times):
            a @ a

    return multiply


def seconds(function: Callable[[], object], *devices: torch.device, repeats: int = 5) -> float:
    """Median time of `function` [s] after one call to warm up. Waits for GPUs before each start and each stop."""
    import torch

    def wait() -> None:
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    function()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _compare(what: str, first: float, second: float) -> Row:
    return Row(what, f"{_ms(first)} / {_ms(second)}", first / second)


def _ms(duration: float) -> str:
    return f"{duration * 1e3:.3g} ms" if duration < 1 else f"{duration * 1e3:,.0f} ms"


def table(rows: list[Row]) -> str:
    """Markdown whose columns also line up in a terminal."""
    cells = [("what", "measured", "ratio")]
    cells += [(r.what, r.measured, "-" if r.ratio is None else f"{r.ratio:.3g}") for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    cells.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2]))
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells
    )
