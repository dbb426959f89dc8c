"""Tokens per second and peak memory of training GPT-2's 124M shape, beside nanoGPT, transformers' Trainer and litgpt.

    git clone https://github.com/karpathy/nanoGPT && export NANOGPT=$PWD/nanoGPT
    pip install litgpt transformers accelerate pluggy   # in another environment: export PEERS_PYTHON=<its python>
    python -m bench.throughput                          # about three quarters of an hour on two cores
    python -m bench.throughput --peers tightfit,nanogpt
    python -m bench.throughput --quick                  # tiny sizes
    python -m bench.throughput --device cuda            # not measured on a GPU yet

Each measurement is a fresh process with all cores, so that its peak memory is its own. Peers take turns; a ratio is of
one turn, and its spread is over the turns. Every step has random tokens, one micro-batch, clipping and an update, and
its loss is read back. Before anything is timed, each network is built without memory, and torch counts the FLOP of one
forward and backward: Tightfit's and nanoGPT's must agree, and so must their weights.

PEERS_PYTHON is asked for peers that this interpreter lacks: litgpt pins packages that others want newer. Measure on a
quiet machine: on a busy one it is OpenMP's spinning that decides, which Tightfit's strategy threads keeps short
(bench/threads.py).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import platform
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from bench.figures import spread

REPO = Path(__file__).parents[1]
GIB = 1 << 30
WARMUP, TOKENS = 2, 1 << 18
"""Steps before timing; random tokens to draw from."""


@dataclass(frozen=True)
class Setting:
    """What is trained, and for how long."""

    device: str
    micro_batch: int
    steps: int
    """That are timed."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 256
    n_vocab: int = 50257

    @property
    def rows(self) -> int:
        """Of the embedding, where it is padded."""
        return -(-self.n_vocab // 64) * 64

    @property
    def all_steps(self) -> int:
        return WARMUP + self.steps

    @property
    def tokens(self) -> int:
        """Per step."""
        return self.micro_batch * self.block_size


@dataclass(frozen=True)
class Peer:
    label: str
    family: str
    """Whose networks and packages these are."""
    note: str = ""
    bf16: bool = False
    compile: bool = False
    shipped: bool = False


TIGHTFIT = "core.trainer.optimizer_step on what core.trainer.build_training makes; strategies: {strategies}"
PEERS = {
    "tightfit": Peer("Tightfit, AdamW", "tightfit", TIGHTFIT),
    "tightfit-shipped": Peer("Tightfit, the profile's strategies", "tightfit", TIGHTFIT, shipped=True),
    "tightfit-bf16": Peer("Tightfit, AdamW, bf16", "tightfit", TIGHTFIT, bf16=True),
    "tightfit-compile": Peer("Tightfit, AdamW, compiled", "tightfit", TIGHTFIT, compile=True),
    "nanogpt": Peer("nanoGPT", "nanogpt", "its train.py, compile=False, with the times it prints; no biases"),
    "nanogpt-bf16": Peer(
        "nanoGPT, bf16", "nanogpt", "its model and optimizer under torch.autocast: its train.py has none on a CPU",
        bf16=True,
    ),
    "nanogpt-compile": Peer(
        "nanoGPT, compiled", "nanogpt", "its train.py, compile=True, with the times it prints; no biases", compile=True
    ),
    "trainer": Peer(
        "transformers' Trainer", "trainer", "GPT2LMHeadModel, dropout 0, vocabulary not padded; defaults: {defaults}"
    ),
    "litgpt": Peer(
        "litgpt", "litgpt",
        "its litgpt.pretrain.setup, which compiles, with the times it prints; rotary positions instead of learned "
        "ones, a quarter of each head as by default; tied embeddings; its last checkpoint is not written",
    ),
}  # fmt: skip
ON = {
    device: [name for name in PEERS if device == "cpu" or not PEERS[name].bf16] for device in ("cpu", "cuda")
}
"""Where not told otherwise. On a card bf16 is what all train in."""
BASELINE = {"cpu": "nanogpt", "cuda": "nanogpt-compile"}
"""nanoGPT as its README runs it there."""
INSTALL = {
    "nanogpt": "git clone https://github.com/karpathy/nanoGPT && export NANOGPT=$PWD/nanoGPT",
    "trainer": "pip install transformers accelerate pluggy",
    "litgpt": "pip install litgpt pluggy",
}


# ---- the networks


def network(family: str, setting: Setting) -> tuple[Any, Callable[[Any, Any], Any]]:
    """A peer's network, and the loss of inputs and targets by it."""
    import torch.nn.functional as F

    if family == "tightfit":
        from core.model import GPT2

        ours = GPT2(model_config(setting))
        return ours, ours
    if family == "nanogpt":
        from model import GPT, GPTConfig  # NANOGPT is on the path

        nano = GPT(GPTConfig(**nanogpt_sizes(setting)))
        return nano, lambda x, y: nano(x, y)[1]
    if family == "trainer":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes: dict[str, Any] = {name: getattr(setting, name) for name in ("n_layer", "n_head", "n_embd")}
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes |= dict.fromkeys(("bos_token_id", "eos_token_id"), setting.n_vocab - 1)
        theirs: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=setting.n_vocab, n_positions=setting.block_size, **sizes)
        )
        return theirs, lambda x, y: theirs(input_ids=x, labels=x).loss
    from litgpt import GPT as LitGPT

    lit = LitGPT(litgpt_config(setting))
    lit.transformer.wte.weight = lit.lm_head.weight
    return lit, lambda x, y: F.cross_entropy(lit(x).flatten(0, 1), y.flatten())


def model_config(setting: Setting) -> Any:
    from core.model_config import ModelConfig
    from core.params import Params

    return ModelConfig.resolve(Params.model_validate(tightfit_params(setting)).model, setting.n_vocab)


def nanogpt_sizes(setting: Setting) -> dict[str, Any]:
    """bias=False and dropout=0 are its train.py's defaults."""
    names = ("n_layer", "n_head", "n_embd", "block_size")
    return {n: getattr(setting, n) for n in names} | {
        "vocab_size": setting.rows,
        "bias": False,
        "dropout": 0.0,
    }


def litgpt_config(setting: Setting) -> Any:
    from litgpt import Config

    return Config(
        name="gpt2-shape",
        n_layer=setting.n_layer,
        n_head=setting.n_head,
        n_embd=setting.n_embd,
        block_size=setting.block_size,
        vocab_size=setting.n_vocab,
        padding_multiple=64,
        parallel_residual=False,
        gelu_approximate="tanh",
    )


def look(family: str, setting: Setting) -> dict[str, Any]:
    """Counts of a peer's network, on tensors without data."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        net, loss = network(family, setting)
        tokens = torch.zeros(1, setting.block_size, dtype=torch.long)
        # This backend is made of products that the counter knows; all of T x T is counted, as 12 L T C does.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss(tokens, tokens).backward()
    parameters = dict(net.named_parameters())
    rows = max(p.shape[0] for p in parameters.values() if p.dim() == 2)
    biases = sum(p.numel() for name, p in parameters.items() if name.endswith(".bias"))
    total = sum(p.numel() for p in parameters.values())
    return {
        "total": total,
        "biases": biases,
        "rows": rows,
        "rest": total - biases - rows * setting.n_embd,
        "flops": counter.get_total_flops() / setting.block_size,
    }


# ---- trainings, each in a process of its own; each returns the seconds of all its steps, and what a note needs


def tightfit_params(setting: Setting, **strategies: Any) -> dict[str, Any]:
    sizes = {name: getattr(setting, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    kind = {"kind": "gpt2"} if setting.n_vocab == 50257 else {"kind": "bpe", "vocab_size": setting.n_vocab}
    return {
        "hardware": {"profile": "cpu" if setting.device == "cpu" else "auto", "strategies": strategies},
        "tokenizer": kind,
        "model": {"architecture": "gpt2", **sizes},
        "train": {
            "max_steps": setting.all_steps,
            "batch_tokens": setting.tokens,
            "micro_batch": setting.micro_batch,
            "lr": 6e-4,  # nanoGPT's
        },
    }


def tightfit_plan(peer: Peer, setting: Setting) -> tuple[Any, Any]:
    """Plan and params; without torch. What fits into memory is not asked: the sizes are given."""
    from core.hardware import read_facts
    from core.params import Params
    from core.plan import resolve
    from core.plugins import Registry
    from core.project import Project

    registry, facts = Registry.load(Project(REPO), entry_points=False), read_facts()

    def plan_with(**strategies: list[str]) -> tuple[Any, Any]:
        params = Params.model_validate(tightfit_params(setting, **strategies))
        return resolve(params, facts, registry), params

    plan, params = plan_with()
    if peer.shipped:
        return plan, params
    if peer.compile:
        strategy = registry.strategies.get("compile")
        why_not = strategy.available(facts, plan.profile) if strategy else "there is no strategy 'compile'"
        if why_not:
            raise ImportError(why_not)
    bf16 = peer.bf16 or setting.device == "cuda"
    others = ("optimizer", "compile") + (() if bf16 else ("precision",))
    remove = [s.name for s in plan.active if s.slot in others]
    add = [*(["bf16"] if bf16 else []), *(["compile"] if peer.compile else [])]
    return plan_with(add=add, remove=[name for name in remove if name not in add])


def train_tightfit(peer: Peer, setting: Setting) -> tuple[list[float], dict[str, Any]]:
    from core.plan import apply_env, runtime

    plan, params = tightfit_plan(peer, setting)
    apply_env(plan)
    import torch

    from core.trainer import build_training, make_accelerator, optimizer_step, set_lr

    hook, said = runtime(plan).hook, list[str]()
    build = build_training(plan, hook, make_accelerator(plan), plan.model, params, said.append)
    build.model.train()
    corpus = torch.randint(setting.n_vocab, (TOKENS,))

    def step(n: int) -> None:
        starts = torch.randint(len(corpus) - setting.block_size, (setting.micro_batch,)).tolist()
        tokens = torch.stack([corpus[i : i + setting.block_size + 1] for i in starts])
        set_lr(build, params.train, n, 0.0)
        loss, _ = optimizer_step(build, hook, [(tokens[:, :-1], tokens[:, 1:])], params.train.grad_clip)
        loss.item()

    seconds = in_turn(setting.all_steps, step)
    strategies = ", ".join(s.name for s in plan.active)
    notes = "; ".join(line.removeprefix("note: ") for line in said if line.startswith("note: "))
    return seconds, {"strategies": f"{strategies}; {notes}" if notes else strategies, "dtype": plan["dtype"]}


def in_turn(times: int, step: Callable[[int], None]) -> list[float]:
    """Seconds of each step."""
    marks = [time.perf_counter()]
    for n in range(times):
        step(n)
        marks.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(marks)]


def train_nanogpt(peer: Peer, setting: Setting) -> tuple[list[float], dict[str, Any]]:
    if peer.bf16:
        return train_nanogpt_bf16(setting), {"dtype": "bf16"}
    import pickle

    import numpy as np

    checkout, here = Path(os.environ["NANOGPT"]), Path.cwd()
    for split in ("train", "val"):
        tokens = np.random.default_rng(1).integers(setting.n_vocab, size=TOKENS, dtype=np.uint16)
        tokens.tofile(here / f"{split}.bin")
    (here / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": setting.rows}))
    # train.py opens it by its bare name; nothing is written into the checkout
    shutil.copy(checkout / "configurator.py", here)
    arguments = {
        "dataset": here,
        "out_dir": here / "out",
        "device": setting.device,
        "compile": peer.compile,
        "batch_size": setting.micro_batch,
        "gradient_accumulation_steps": 1,
        "max_iters": setting.all_steps - 1,  # it does one more
        "eval_interval": 10**9,  # it evaluates before the first step all the same
        "eval_iters": 1,
        "log_interval": 1,
        **{name: getattr(setting, name) for name in ("n_layer", "n_head", "n_embd", "block_size")},
    }
    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in arguments.items())]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(checkout / "train.py"), run_name="__main__")
    found = re.findall(r"^iter \d+: .* time ([\d.]+)ms", output.getvalue(), re.M)
    return [float(ms) / 1000 for ms in found], {"dtype": "fp32" if setting.device == "cpu" else "bf16"}


def train_nanogpt_bf16(setting: Setting) -> list[float]:
    """On a CPU. Its hyperparameters and the order of its loop."""
    import torch

    with contextlib.redirect_stdout(io.StringIO()):
        net, loss_of = network("nanogpt", setting)
        optimizer = net.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    corpus = torch.randint(setting.n_vocab, (TOKENS,))

    def step(n: int) -> None:
        starts = torch.randint(len(corpus) - setting.block_size, (setting.micro_batch,)).tolist()
        tokens = torch.stack([corpus[i : i + setting.block_size + 1] for i in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return in_turn(setting.all_steps, step)


def random_rows(setting: Setting, length: int) -> Any:
    """[rows, length] tokens: more than a training reads."""
    import torch

    n = (setting.all_steps + WARMUP) * setting.micro_batch
    return torch.randint(setting.n_vocab, (n, length))


def train_trainer(peer: Peer, setting: Setting) -> tuple[list[float], dict[str, Any]]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_begin(self, *args: Any, **also: Any) -> None:
            self.marks = self.marks or [time.perf_counter()]

        def on_step_end(self, *args: Any, **also: Any) -> None:
            if setting.device == "cuda":
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    net, _ = network("trainer", setting)
    arguments = TrainingArguments(
        "out",
        use_cpu=setting.device == "cpu",
        bf16=setting.device == "cuda",
        per_device_train_batch_size=setting.micro_batch,
        max_steps=setting.all_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock()
    rows: Any = [{"input_ids": row, "labels": row} for row in random_rows(setting, setting.block_size)]
    Trainer(net, arguments, train_dataset=rows, callbacks=[clock]).train()
    defaults = f"optim={getattr(arguments.optim, 'value', arguments.optim)}, "
    defaults += f"max_grad_norm={arguments.max_grad_norm}"
    seconds = [b - a for a, b in itertools.pairwise(clock.marks)]
    return seconds, {"defaults": defaults, "dtype": "fp32" if setting.device == "cpu" else "bf16"}


def train_litgpt(peer: Peer, setting: Setting) -> tuple[list[float], dict[str, Any]]:
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from torch.utils.data import DataLoader

    rows = random_rows(setting, setting.block_size + 1)

    class Random(DataModule):
        def connect(self, *args: Any, **also: Any) -> None:
            pass

        def train_dataloader(self) -> Any:
            return DataLoader(rows, batch_size=setting.micro_batch)

        val_dataloader = train_dataloader

    dtype, precision = ("fp32", "32-true") if setting.device == "cpu" else ("bf16", "bf16-mixed")
    pretrain.save_checkpoint = lambda *args, **also: None
    with contextlib.redirect_stdout(io.StringIO()) as output:
        pretrain.setup(
            "",
            litgpt_config(setting),
            out_dir=Path("out"),
            precision=precision,
            data=Random(),
            train=TrainArgs(
                save_interval=None,
                global_batch_size=setting.micro_batch,
                micro_batch_size=setting.micro_batch,
                lr_warmup_steps=1,
                max_tokens=setting.all_steps * setting.tokens,
                max_norm=1.0,
                tie_embeddings=True,
            ),
            eval=EvalArgs(interval=10**9, max_iters=1),
            devices=1,
            logger_name="csv",
        )
    found = re.findall(r"iter time: ([\d.]+) ms", output.getvalue())
    return [float(ms) / 1000 for ms in found], {"dtype": dtype}


TRAIN = {
    "tightfit": train_tightfit,
    "nanogpt": train_nanogpt,
    "trainer": train_trainer,
    "litgpt": train_litgpt,
}


def peak_rate(setting: Setting, bf16: bool) -> dict[str, Any]:
    """The rate that a share is taken of [FLOP/s]."""
    peer = replace(PEERS["tightfit"], bf16=bf16)
    plan, _ = tightfit_plan(peer, setting)
    import torch

    from core.monitor import peak_flops

    rate, source = peak_flops(plan, torch.device(setting.device))
    return {"rate": rate, "source": source}


# ---- a child


def job(what: str, name: str, setting: Setting) -> dict[str, Any]:
    """What the child of that name does. ImportError: it is not here."""
    peer = PEERS[name]
    if peer.family == "nanogpt":
        checkout = os.environ.get("NANOGPT", "")
        if not (Path(checkout) / "train.py").is_file():
            raise ImportError("NANOGPT names no checkout")
        sys.path.insert(0, checkout)
    if what == "rate":
        return peak_rate(setting, peer.bf16)
    if what == "look":
        found = look(peer.family, setting)
        return (
            found | {"active": [s.name for s in tightfit_plan(peer, setting)[0].active]}
            if (peer.family == "tightfit")
            else found
        )
    seconds, more = TRAIN[peer.family](peer, setting)
    assert len(seconds) == setting.all_steps, f"{len(seconds)} of {setting.all_steps} steps"
    import torch

    from core.monitor import peak_resident

    cuda = setting.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    return {"seconds": seconds[WARMUP:], "peak": peak, "torch": torch.__version__, **more}


def child(text: str) -> None:
    """Do a job given as JSON, in a folder that is thrown away; print what comes out as JSON."""
    given = json.loads(text)
    setting = Setting(**given["setting"])
    with tempfile.TemporaryDirectory(prefix="throughput-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        try:
            found = job(given["what"], given["peer"], setting)
        except ImportError as error:
            found = {"missing": str(error)}
        except RuntimeError as error:
            from core.errors import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            found = {"problem": "does not fit"}
        os.chdir(REPO)
    print(json.dumps(found), flush=True)


class Children:
    """Starts them, with all cores and one cache of compiled code."""

    def __init__(self, device: str, threads: int, cache: str) -> None:
        self.environ = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        if device == "cpu":
            self.environ["CUDA_VISIBLE_DEVICES"] = ""
        if os.environ.get("NANOGPT"):
            self.environ["NANOGPT"] = str(Path(os.environ["NANOGPT"]).resolve())
        self.pythons: dict[str, str] = {}
        """{family: interpreter}, where it is not this one."""

    def __call__(self, what: str, name: str, setting: Setting) -> dict[str, Any]:
        text = json.dumps({"what": what, "peer": name, "setting": asdict(setting)})
        python = self.pythons.get(PEERS[name].family, sys.executable)
        done = subprocess.run(
            [python, "-m", "bench.throughput", "--job", text],
            cwd=REPO,
            env=self.environ,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if done.returncode:  # one that fails does not take the others along
            click.echo(f"{PEERS[name].label}, {what}:\n{done.stderr[-2000:]}", err=True)
            if what == "rate":
                raise click.ClickException("the peak rate was not measured")
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"problem": f"failed: {last}", "missing": last}
        return json.loads(done.stdout.splitlines()[-1])

    def look(self, name: str, setting: Setting) -> dict[str, Any]:
        """Counts of the peer's network. A peer that is missing here is asked for in PEERS_PYTHON."""
        found = self("look", name, setting)
        other = os.environ.get("PEERS_PYTHON")
        if "missing" in found and other:
            self.pythons[PEERS[name].family] = other
            found = self("look", name, setting)
        return found


# ---- the tables


def require_equal(looks: dict[str, dict[str, Any]], flops: float) -> None:
    """Raises where Tightfit's and nanoGPT's arithmetic differ: weights but for padding, FLOP against the formula."""
    pairs = {PEERS[name].family: found for name, found in looks.items()}
    ours, theirs = pairs.get("tightfit"), pairs.get("nanogpt")
    for found in (ours, theirs):
        if found and found["flops"] != flops:
            raise click.ClickException(
                f"{found['flops']:,.0f} FLOP per token, 6 N + 12 L T C is {flops:,.0f}"
            )
    if ours and theirs and (ours["rest"], ours["rows"]) != (theirs["rest"], theirs["rows"]):
        raise click.ClickException(f"Tightfit's and nanoGPT's weights differ: {ours} and {theirs}")


def table_of_networks(looks: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| network | parameters | of them biases | rows of the embedding | other weights | MFLOP per token |"
    yield "|---|---|---|---|---|---|"
    shown = set()
    for name, found in looks.items():
        family = PEERS[name].family
        if family not in shown:
            shown.add(family)
            cells = [f"{found[key]:,}" for key in ("total", "biases", "rows", "rest")]
            label = {"tightfit": "Tightfit", "trainer": "transformers"}.get(family, PEERS[name].label)
            yield f"| {label} | {' | '.join(cells)} | {found['flops'] / 1e6:,.1f} |"


def table_of_speed(
    done: dict[str, list[dict[str, Any]]], setting: Setting, rates: dict[str, float], flops: float
) -> Iterator[str]:
    """done: {peer: what each turn found}."""
    cuda = setting.device == "cuda"
    memory = "peak GiB allocated" if cuda else "peak GiB resident"
    yield f"| training | numbers | tokens/s | / {PEERS[BASELINE[setting.device]].label} | {memory} | of the peak rate |"
    yield "|---|---|---|---|---|---|"
    speeds = {
        name: [setting.tokens * setting.steps / sum(turn["seconds"]) for turn in turns]
        for name, turns in done.items()
        if not any("problem" in turn for turn in turns)
    }
    base = speeds.get(BASELINE[setting.device])
    for name, turns in done.items():
        if name not in speeds:
            problem = next(turn["problem"] for turn in turns if "problem" in turn)
            yield f"| {PEERS[name].label} | - | {problem} | - | - | - |"
            continue
        mine, dtype = speeds[name], turns[0]["dtype"]
        ratio = spread([a / b for a, b in zip(mine, base, strict=True)], ".2f") if base else "-"
        peak = spread([turn["peak"] / GIB for turn in turns], ".2f")
        share = f"{statistics.median(mine) * flops / rates[dtype]:.0%}" if rates.get(dtype) else "-"
        yield f"| {PEERS[name].label} | {dtype} | {spread(mine, ',.0f')} | {ratio} | {peak} | {share} |"


def chosen(peers: str, device: str, cpu_bf16: bool) -> tuple[list[str], list[str]]:
    """The peers to measure, and why some are not."""
    names = ON[device] if peers == "all" else [name.strip() for name in peers.split(",")]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise click.UsageError(f"--peers: no {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if device == "cuda" or cpu_bf16:
        return names, []
    why = "not measured: this CPU has no bf16 instructions"
    return (
        [name for name in names if not PEERS[name].bf16],
        [f"{PEERS[name].label}: {why}" for name in names if PEERS[name].bf16],
    )


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--peers", default="all", help=f"Of {','.join(PEERS)}.")
@click.option("--turns", default=3, show_default=True)
@click.option("--steps", default=4, show_default=True, help="Timed ones of the largest micro-batch.")
@click.option("--micro-batch", "sizes", type=int, multiple=True, help="Default: 1 and 4; on a GPU 8.")
@click.option("--quick", is_flag=True, help="Tiny sizes, one turn.")
@click.option("--job", "given", hidden=True)
def main(
    device: str, peers: str, turns: int, steps: int, sizes: tuple[int, ...], quick: bool, given: str | None
) -> None:
    """Print tables in Markdown: the networks, and speed and memory for each micro-batch."""
    if given:
        return child(given)
    from core.hardware import read_facts

    start, facts = time.perf_counter(), read_facts()
    load = f"load average {os.getloadavg()[0]:.1f} before, " if hasattr(os, "getloadavg") else ""
    if device == "cuda" and not (facts.gpu and facts.torch_cuda):
        raise click.ClickException("no NVIDIA card that this torch can use")
    sizes = sizes or ((1, 4) if device == "cpu" else (8,))
    setting = Setting(device, max(sizes), steps, block_size=256 if device == "cpu" else 1024)
    if quick:
        setting = replace(setting, n_layer=2, n_head=2, n_embd=64, n_vocab=512, steps=2)
        turns = 1
    names, left_out = chosen(peers, device, facts.cpu_bf16)
    flops = model_config(setting).flops_per_token
    with tempfile.TemporaryDirectory(prefix="throughput-cache-", ignore_cleanup_errors=True) as cache:
        run = Children(device, facts.cores, cache)
        looks: dict[str, dict[str, Any]] = {}
        for name in names:
            found = run.look(name, setting)
            same = [one for one in looks if "active" in found and found["active"] == looks[one].get("active")]
            if "missing" in found:
                remedy = INSTALL.get(PEERS[name].family, "")
                left_out.append(f"{PEERS[name].label} is left out ({found['missing']}) {remedy}".rstrip())
            elif same:
                left_out.append(f"{PEERS[name].label}: the same here as {PEERS[same[0]].label}")
            else:
                looks[name] = found
        require_equal(looks, flops)
        if not looks:
            raise click.ClickException("; ".join(left_out) or "nothing to measure")
        results: dict[int, dict[str, list[dict[str, Any]]]] = {n: {name: [] for name in looks} for n in sizes}
        measured: dict[str, list[dict[str, Any]]] = {}
        dtypes = {"fp32": "tightfit"} if device == "cpu" else {"bf16": "tightfit"}
        dtypes |= {"bf16": "tightfit-bf16"} if device == "cpu" and facts.cpu_bf16 else {}
        settings = {n: replace(setting, micro_batch=n, steps=setting.steps * max(sizes) // n) for n in sizes}
        for turn in range(turns):
            for dtype, name in dtypes.items():
                measured.setdefault(dtype, []).append(run("rate", name, setting))
            for n in sizes:
                for name in list(looks)[:: -1 if turn % 2 else 1]:
                    results[n][name].append(run("train", name, settings[n]))
    say(setting, settings, looks, results, measured, flops, facts.cores)
    for line in left_out:
        click.echo(f"- {line}")
    seconds = time.perf_counter() - start
    click.echo(f"\n{platform.system()}, Python {platform.python_version()}; {load}{seconds:.0f} s")


def say(
    setting: Setting,
    settings: dict[int, Setting],
    looks: dict[str, dict[str, Any]],
    results: dict[int, dict[str, list[dict[str, Any]]]],
    measured: dict[str, list[dict[str, Any]]],
    flops: float,
    cores: int,
) -> None:
    """Print everything."""
    s = setting
    click.echo(
        f"GPT-2 with {s.n_layer} layers, {s.n_head} heads, {s.n_embd} wide, {s.n_vocab:,} ids, context {s.block_size}; "
        f"{s.device}, {cores} threads\n"
    )
    for line in table_of_networks(looks):
        click.echo(line)
    rates = {dtype: statistics.median(m["rate"] for m in found) for dtype, found in measured.items()}
    click.echo(f"\nThe formula 6 N + 12 L T C gives {flops / 1e6:,.1f} MFLOP per token. Peak rates:")
    for dtype, found in measured.items():
        tera = spread([m["rate"] / 1e12 for m in found], ".3f")
        click.echo(f"- {dtype}: {tera} TFLOP/s, {found[0]['source']}")
    for n, done in results.items():
        click.echo(f"\nmicro-batch {n} x {s.block_size}, {settings[n].steps} steps after {WARMUP}\n")
        for line in table_of_speed(done, settings[n], rates, flops):
            click.echo(line)
    click.echo("")
    for name in looks:
        last = next(iter(results.values()))[name][-1]
        if "problem" not in last:
            click.echo(f"- {PEERS[name].label}: {PEERS[name].note.format(**last)}; torch {last['torch']}")


if __name__ == "__main__":
    main()
