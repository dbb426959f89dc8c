"""How near the memory planner comes to real tensors, to torch's allocator, to published runs, and beside its peers.

    python -m bench.memory                    # all four tables
    python -m bench.memory --table published  # one of them

real: the simulated peak against the same step on real tensors on the CPU, which must agree to the byte.
allocator: against the peak of torch's own CPU allocator over two real steps, from the profiler's [memory] events.
published: against `torch.cuda.memory_reserved` of five runs on an A100 with torch 2.6 and CUDA 12.4, from
ch05/10_llm-training-speed/README.md of github.com/rasbt/LLMs-from-scratch (commit 06361583): baseline and steps 1, 5,
6 and 7, each on top of the ones before. The network here is our own, written from their list of operations: 163M
parameters, GPT-2's sizes with an untied head, 8 x 1024 tokens, dropout 0.1, AdamW. No constant is fitted.
peers: what other tools estimate for training with Adam, beside the figures of the last two tables.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import core
from core.hookspecs import GIB, Plan
from core.memory.deepen import SHALLOW
from core.memory.simulate import cublas_workspace, cuda_semantics, fresh_accelerate, simulate, tape_of
from core.memory.tape import Tape
from core.memory.trace import Trace
from core.model import build_model
from core.model_config import ModelConfig
from core.params import Params
from core.plan import resolve, runtime
from core.plugin_check import machine
from core.plugins import Registry
from core.project import Project

MIB = 1 << 20
COMPARED = {"bf16", "malloc", "muon", "checkpointing", "chunked_head", "adamw8bit", "bf16_weights"}
"""Strategies that change memory; a configuration has those it names, whatever its profile has."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """For many small steps: on one thread, and without the garbage collector looking through what was there before.

    Threads that wait for each other on a busy machine take ten times as long. Bytes are the same either way.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


# ---- configurations


@dataclass(frozen=True)
class Configuration:
    """A small training run on the profile cpu."""

    architecture: str
    dtype: str
    strategies: tuple[str, ...] = ()
    n_layer: int = SHALLOW + 1  # so that it is simulated on fewer and deepened
    n_head: int = 4
    n_embd: int = 96
    block_size: int = 64
    vocab_size: int = 1024
    micro_batch: int = 8
    chunk: int = 128
    """Tokens that the chunked head takes at once."""

    @property
    def name(self) -> str:
        return " ".join((self.architecture, self.dtype, *self.strategies))

    def plan(self, registry: Registry) -> tuple[Plan, Params]:
        sizes = ("architecture", "n_layer", "n_head", "n_embd", "block_size")
        wanted = {*self.strategies, *(["bf16"] if self.dtype == "bf16" else [])}
        options = {"chunked_head": {"tokens": self.chunk}} if "chunked_head" in wanted else {}
        params = Params.model_validate(
            {
                "hardware": {
                    "profile": "cpu",
                    "strategies": {
                        "add": sorted(wanted),
                        "remove": sorted((COMPARED & registry.strategies.keys()) - wanted),
                    },
                    "options": options,
                },
                "tokenizer": {"kind": "bpe", "vocab_size": self.vocab_size},
                "model": {name: getattr(self, name) for name in sizes},
                "train": {"max_steps": 1, "batch_tokens": 2 * self.micro_batch * self.block_size},
            }
        )
        return resolve(params, machine(registry.profile("cpu")), registry), params


def bundled() -> Registry:
    """The plugins that come with Tightfit."""
    return Registry.load(Project(Path(core.__file__).parents[1]), entry_points=False)


def runnable(strategies: Iterable[str], registry: Registry) -> bool:
    """Whether these strategies exist, and what they import is installed."""
    needs = {"adamw8bit": "bitsandbytes", "bf16_weights": "bitsandbytes"}
    return all(
        name in registry.strategies and importlib.util.find_spec(needs.get(name, "torch"))
        for name in strategies
    )


def configurations(registry: Registry) -> list[Configuration]:
    """What table `real` compares: dtypes, strategies and architectures, each with each."""
    stacks: list[tuple[str, ...]] = [
        (),
        ("checkpointing",),
        ("chunked_head",),
        ("checkpointing", "chunked_head"),
    ]
    each = [
        (name, dtype, stack) for name in ("qwen3", "gpt2") for dtype in ("fp32", "bf16") for stack in stacks
    ]
    each += [("gpt2", "fp32", ("adamw8bit",))]
    each += [(name, "bf16", (*stacks[-1], "bf16_weights")) for name in ("qwen3", "gpt2")]
    return [Configuration(*one) for one in each if runnable(one[2], registry)]


def large(registry: Registry) -> list[Configuration]:
    """What table `allocator` compares: runs of a few hundred MiB.

    Not bf16_weights: on a CPU, bitsandbytes makes fp32 copies of what it updates, where its CUDA kernels make none.
    """
    both = ("checkpointing", "chunked_head")
    stacks: list[tuple[str, str, tuple[str, ...]]] = [
        *(("qwen3", "fp32", ()), ("qwen3", "bf16", ()), ("qwen3", "fp32", both), ("qwen3", "bf16", both)),
        *(("gpt2", "fp32", ()), ("gpt2", "bf16", ()), ("gpt2", "bf16", ("checkpointing",))),
        *(("gpt2", "fp32", ("chunked_head",)), ("qwen3", "fp32", ("adamw8bit",))),
    ]
    return [
        Configuration(*stack, n_embd=256, block_size=256, vocab_size=8192, micro_batch=8)
        for stack in stacks
        if runnable(stack[2], registry)
    ]


# ---- against real tensors


@dataclass(frozen=True)
class Comparison:
    """Peaks of one configuration [bytes], with gradients there when forward runs (accumulates) or not."""

    configuration: Configuration
    accumulates: bool
    simulated: int
    """At this micro-batch."""
    real: int
    """The same on real tensors."""
    scaled: int
    """From the tape that serves every micro-batch, of a shallow network made deep."""

    @property
    def equal(self) -> bool:
        return self.simulated == self.real == self.scaled


def compare(configuration: Configuration, registry: Registry) -> list[Comparison]:
    """Simulate, run on real tensors, and play the tape of any micro-batch."""
    plan, params = configuration.plan(registry)
    n = configuration.micro_batch
    with undisturbed():
        tapes = (
            simulate(plan, params, micro_batch=n),
            simulate(plan, params, micro_batch=n, fake=False),
            tape_of(plan, params),
        )
    return [
        Comparison(configuration, accumulates, *(tape.peak(n, accumulates).bytes for tape in tapes))
        for accumulates in (True, False)
    ]


# ---- against torch's CPU allocator


def allocator_peak(configuration: Configuration, registry: Registry, accumulates: bool) -> int:
    """Peak of what torch's CPU allocator hands out in two real optimizer steps of the trainer [bytes]."""
    from core.trainer import build_training, make_accelerator, optimizer_step

    plan, params = configuration.plan(registry)
    steps = 2 if accumulates else 1
    plan.set("gradient_accumulation_steps", steps, reason="as compared", by="bench")
    hook = runtime(plan).hook

    def token_ids() -> Tensor:
        return torch.zeros(configuration.micro_batch, configuration.block_size, dtype=torch.int64)

    with (
        undisturbed(),
        fresh_accelerate(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof,
    ):
        accelerator = make_accelerator(plan)
        build = build_training(plan, hook, accelerator, plan.model, params, lambda line: None)
        build.model.train()
        for _ in range(2):
            window = [(token_ids(), token_ids()) for _ in range(steps)]
            optimizer_step(build, hook, window, params.train.grad_clip)
    results: Any = prof.profiler.kineto_results
    events = sorted(
        (e.start_ns(), i, e.nbytes()) for i, e in enumerate(results.events()) if e.name() == "[memory]"
    )
    alive = peak = 0
    for *_, nbytes in events:
        alive += nbytes
        peak = max(peak, alive)
    return peak


# ---- against published runs

WIDTH, HEADS, LAYERS, LENGTH, BATCH, VOCABULARY, DROPOUT = 768, 12, 12, 1024, 8, 50257, 0.1


@dataclass(frozen=True)
class PublishedRun:
    """One of the published runs: what was reserved [GiB], and how it computes."""

    name: str
    reserved_gib: float
    mask: str = "made"
    """Of the attention: "kept" by every layer, "made" in every forward, or "" with fused attention."""
    classes: bool = False
    """torch's own LayerNorm and GELU, instead of ones from single operations."""
    half: bool = False
    """bf16 weights, and with them everything else."""
    fused: bool = True
    """The optimizer's update is one kernel, instead of one operation on all tensors after the other."""


def published_runs() -> list[PublishedRun]:
    return [
        PublishedRun("baseline", 26.2617, mask="kept", fused=False),
        PublishedRun("mask made on the fly", 26.2422),
        PublishedRun("bf16", 13.7871, half=True),
        PublishedRun("torch's LayerNorm and GELU", 11.5645, half=True, classes=True),
        PublishedRun("fused attention", 5.9004, mask="", half=True, classes=True),
    ]


class Norm(nn.Module):
    """Layer norm from single operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        return self.weight * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.bias


class Gelu(nn.Module):
    """GELU's tanh approximation from single operations."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))
        return 0.5 * x * (1 + torch.tanh(inner))


def later_tokens() -> Tensor:
    """[T, T], 1 where a column comes after its row."""
    return torch.ones(LENGTH, LENGTH).triu(1)


class Attention(nn.Module):
    later: Tensor

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask
        widths = [WIDTH] * 3 if mask else [3 * WIDTH]
        self.inputs = nn.ModuleList(nn.Linear(WIDTH, width, bias=False) for width in widths)
        self.output = nn.Linear(WIDTH, WIDTH)
        if mask == "kept":
            self.register_buffer("later", later_tokens())

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        D = C // HEADS
        if not self.mask:
            q, k, v = self.inputs[0](x).view(B, T, 3, HEADS, D).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.output(y.transpose(1, 2).contiguous().view(B, T, C))
        q, k, v = (linear(x).view(B, T, HEADS, D).transpose(1, 2) for linear in self.inputs)
        scores = q @ k.transpose(2, 3)  # [B, H, T, T], alive until this returns
        later = (self.later if self.mask == "kept" else later_tokens()).bool()
        scores.masked_fill_(later, -math.inf)
        weights = F.dropout(torch.softmax(scores / math.sqrt(D), -1), DROPOUT, self.training)
        return self.output((weights @ v).transpose(1, 2).reshape(B, T, C))


class Layer(nn.Module):
    def __init__(self, run: PublishedRun) -> None:
        super().__init__()
        gelu = nn.GELU("tanh") if run.classes else Gelu()
        self.attention = Attention(run.mask)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), gelu, nn.Linear(4 * WIDTH, WIDTH))
        self.before_attention, self.before_mlp = norm(run), norm(run)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.attention(self.before_attention(x)), DROPOUT, self.training) + x
        return F.dropout(self.mlp(self.before_mlp(x)), DROPOUT, self.training) + x


def norm(run: PublishedRun) -> nn.Module:
    return nn.LayerNorm(WIDTH) if run.classes else Norm()


class Published(nn.Module):
    """The published network: [B, T] token ids → [B, T, V] logits."""

    def __init__(self, run: PublishedRun) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer(run) for _ in range(LAYERS)))
        self.norm = norm(run)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.layers(F.dropout(x, DROPOUT, self.training))))


def halve(model: nn.Module) -> None:
    """To bf16 parameter by parameter, as Module.to() does."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().bfloat16()))


def published_tape(run: PublishedRun) -> Tape:
    """Build, three steps, and an evaluation after the first, as the published script begins."""
    trace = Trace(cuda=True, workspace=cublas_workspace((8, 0)))
    with FakeTensorMode(), cuda_semantics(True), trace:
        trace.tape.begin("build")
        model = Published(run)
        gc.collect()
        trace.tape.settle()
        if run.half:
            halve(model)
        update: dict[str, Any] = {
            "fused": run.fused,
            "foreach": not run.fused,
        }  # foreach: the default on CUDA
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, **update)

        def loss_of_batch() -> Tensor:
            x, y = (torch.empty(BATCH, LENGTH, dtype=torch.int64) for _ in "xy")
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

        for step in range(3):
            optimizer.zero_grad()
            loss = loss_of_batch()
            loss.backward()
            optimizer.step()
            if step == 0:
                model.eval()
                with torch.no_grad():
                    loss_of_batch()
                model.train()
    return trace.tape


@cache
def published_reserved(run: PublishedRun) -> int:
    """What torch would have reserved on that card [bytes]."""
    return published_tape(run).play(1, accumulates=True).reserved


# ---- peers


def accelerate_estimate(model: nn.Module, dtype: str) -> int:
    """`accelerate estimate-memory`'s column "Training using Adam" (its own functions) [bytes]."""
    total, _ = calculate_maximum_sizes(model)
    names = {"fp32": "float32", "bf16": "float16"}  # the ones that it offers
    return int(max(estimate_training_usage(total, names[dtype]).values()))


def litgpt_estimate(config: ModelConfig, bytes_per_weight: int) -> int:
    """litgpt 0.5.13's `estimate_model_memory(training=True)`: four times its count of the weights [bytes].

    The count (litgpt/utils.py, commit 26857050) is two embeddings, matrices and norms; no biases, no positions.
    """
    matrices = 3 if config.architecture == "qwen3" else 2
    layer = config.n_embd * config.head_dim * (2 * config.n_head + 2 * config.n_kv_head)
    layer += matrices * config.n_embd * config.n_inner + 2 * config.n_embd
    count = 2 * config.vocab_size * config.n_embd + config.n_layer * layer + config.n_embd
    return 4 * bytes_per_weight * count


def published_config() -> ModelConfig:
    sizes: dict[str, Any] = {
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_kv_head": HEADS,
        "n_embd": WIDTH,
        "n_inner": 4 * WIDTH,
    }
    return ModelConfig("gpt2", **sizes, block_size=LENGTH, vocab_size=VOCABULARY, tie_embeddings=False)


# ---- tables


def real_table(registry: Registry) -> Iterator[str]:
    yield "| run | accumulates | simulated [bytes] | on real tensors | for any micro-batch | equal |"
    yield "|---|---|---|---|---|---|"
    compared = [c for configuration in configurations(registry) for c in compare(configuration, registry)]
    for c in compared:
        cells = f"{c.simulated:,} | {c.real:,} | {c.scaled:,} | {yes(c.equal)}"
        yield f"| {c.configuration.name} | {yes(c.accumulates)} | {cells} |"
    yield f"\n{sum(c.equal for c in compared)} of {len(compared)} equal to the byte"


def yes(value: bool) -> str:
    return "yes" if value else "no"


@dataclass(frozen=True)
class Allocated:
    configuration: Configuration
    accumulates: bool
    simulated: int
    true: int


@cache
def allocated(registry: Registry) -> list[Allocated]:
    """Table `allocator`; what accumulates and what does not takes turns."""
    rows = []
    for i, configuration in enumerate(large(registry)):
        plan, params = configuration.plan(registry)
        accumulates = i % 2 == 0
        simulated = tape_of(plan, params).peak(configuration.micro_batch, accumulates).bytes
        rows.append(
            Allocated(
                configuration, accumulates, simulated, allocator_peak(configuration, registry, accumulates)
            )
        )
    return rows


def allocator_table(registry: Registry) -> Iterator[str]:
    yield "| run | accumulates | simulated [MiB] | torch's allocator [MiB] | ratio |\n|---|---|---|---|---|"
    for row in allocated(registry):
        cells = f"{row.simulated / MIB:.1f} | {row.true / MIB:.1f} | {row.simulated / row.true:.4f}"
        yield f"| {row.configuration.name} | {yes(row.accumulates)} | {cells} |"


def published_table(registry: Registry) -> Iterator[str]:
    yield "| run | simulated [GiB] | published [GiB] | ratio | seconds |\n|---|---|---|---|---|"
    for run in published_runs():
        start = time.perf_counter()
        reserved = published_reserved(run) / GIB
        seconds = time.perf_counter() - start
        cells = f"{reserved:.4f} | {run.reserved_gib} | {reserved / run.reserved_gib:.4f} | {seconds:.1f}"
        yield f"| {run.name} | {cells} |"


def peers_table(registry: Registry) -> Iterator[str]:
    yield "| run | true [MiB] | Tightfit | accelerate | litgpt |\n|---|---|---|---|---|"

    def row(name: str, true: float, *estimates: float) -> str:
        return f"| {name} | {true / MIB:,.0f} | " + " | ".join(f"{e / true:.3f}" for e in estimates) + " |"

    for run in published_runs():
        with torch.device("meta"):
            model = Published(run)
        theirs = accelerate_estimate(model, "bf16" if run.half else "fp32")
        others = theirs, litgpt_estimate(published_config(), 2 if run.half else 4)
        yield row(f"A100: {run.name}", run.reserved_gib * GIB, published_reserved(run), *others)
    for done in allocated(registry):
        config, dtype = done.configuration.plan(registry)[0].model, done.configuration.dtype
        theirs = accelerate_estimate(build_model(config, seed=1), dtype)
        others = theirs, litgpt_estimate(config, 4)
        yield row(f"CPU: {done.configuration.name}", done.true, done.simulated, *others)


TABLES: dict[str, Callable[[Registry], Iterator[str]]] = {
    "real": real_table,
    "allocator": allocator_table,
    "published": published_table,
    "peers": peers_table,
}


@click.command()
@click.option(
    "--table", type=click.Choice(list(TABLES)), multiple=True, help="One of the tables; all without it."
)
def main(table: tuple[str, ...]) -> None:
    """Print the tables in Markdown."""
    registry = bundled()
    for name in table or TABLES:
        start = time.perf_counter()
        click.echo(f"## {name}\n")
        for line in TABLES[name](registry):
            click.echo(line)
        click.echo(f"\n{time.perf_counter() - start:.0f} s\n")


if __name__ == "__main__":
    main()
