"""Rehearsals of broken and hostile input: damaged tokens, missing files, bad params, bombs, odd text, odd places."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.project import Project
from core.selftest.lab import PATIENCE, Ended, Lab, Outcome, Tally, fault, small_corpus, write_params

LINE_MB = 24
RSS_MB = 300
"""The most that a process may hold while it reads a line of LINE_MB."""


def refused(action: Callable[[], Any], *words: str) -> bool:
    """Whether it raises UserError with all these words in it, in a message that a person would read."""
    try:
        action()
    except UserError as error:
        return all(word in str(error) for word in words) and len(str(error)) < 20_000
    return False


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fresh(project: Project, stage: str, **environ: str) -> Ended:
    """Run a stage in a process that starts from nothing."""
    command = [sys.executable, "-m", f"stages.{stage}"]
    code = Path(__file__).parents[2]
    done = subprocess.run(
        command,
        cwd=project.root,
        env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
        check=False,
    )
    return Ended(done.returncode, done.stdout.decode("utf-8", "replace"))


# --- tokens and their cache ---------------------------------------------------------------------------------------


def beyond_the_vocabulary(tokens: Path) -> None:
    """An id that there is not, under a hash that was made for it."""
    from core.files import sha256_file

    path = tokens / "train_000.bin"
    content = bytearray(path.read_bytes())
    content[200:202] = b"\xff\xff"
    path.write_bytes(content)

    def sign(manifest: Any) -> None:
        manifest["train"]["shards"][0]["sha256"] = sha256_file(path)

    edit_json(tokens / "manifest.json", sign)


def swapped_shards(tokens: Path) -> None:
    train, val = tokens / "train_000.bin", tokens / "val_000.bin"
    a, b = train.read_bytes(), val.read_bytes()
    train.write_bytes(b + a[len(b) :])
    val.write_bytes(a[: len(b)])


def swapped_tokenizer(tokens: Path) -> None:
    from core.tokenizer import Tokenizer

    Tokenizer.byte().save(tokens / "tokenizer")


def cut(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "odd length": (lambda t: cut(t / "train_000.bin", -1), "train_000.bin"),
    "half": (lambda t: cut(t / "train_000.bin", (t / "train_000.bin").stat().st_size // 4 * 2), "train_000.bin"),
    "empty": (lambda t: cut(t / "val_000.bin", 0), "val_000.bin"),
    "a flipped bit": (lambda t: flip(t / "train_000.bin", 1001), "train_000.bin"),
    "a flipped bit in held-out text": (lambda t: flip(t / "val_000.bin", 11), "val_000.bin"),
    "an id beyond the vocabulary": (beyond_the_vocabulary, "train_000.bin"),
    "two files swapped": (swapped_shards, "train_000.bin"),
    "another tokenizer": (swapped_tokenizer, "tokenizer"),
    "a missing file": (lambda t: (t / "val_000.bin").unlink(), "val_000.bin"),
}  # fmt: skip


@fault("F11", "damaged token files", times=len(DAMAGE))
def damaged_tokens(lab: Lab, times: int) -> Outcome:
    """`train` names the file and the way out before its first step."""
    tally = Tally()
    for name, (damage, file) in DAMAGE.items():
        project = lab.project("damaged")
        damage(project.tokens)
        ended = lab.run(project, "train")
        untouched = not project.final_model.exists() and not list(project.runs.rglob("*.safetensors"))
        survived = ended.code == 2 and ended.says(file, "dvc repro -f -s tokenize") and untouched
        tally.check(f"{name}: {ended.code} {ended.out[-300:]}", survived)
    return tally.outcome()


def no_git() -> str | None:
    return None if shutil.which("git") else "git is not installed"


@fault("F12", "a rotten object in DVC's cache", times=2, unless=no_git)
def rotten_cache(lab: Lab, times: int) -> Outcome:
    """DVC hands it out and calls it up to date; `train` does not take it, and what the message says mends it."""
    from core.files import sha256_file
    from core.tokens import LOOK_AGAIN

    tally = Tally()
    project = lab.repository("rotten")

    def dvc(*arguments: str) -> str:
        with lab.dvc(project, *arguments) as process:
            return process.communicate(timeout=PATIENCE)[0]

    dvc("repro", "tokenize")
    shard = project.tokens / "train_000.bin"
    good = sha256_file(shard)
    objects = [p for p in (project.root / ".dvc" / "cache").rglob("*") if p.is_file()]
    (cached,) = [p for p in objects if sha256_file(p) == good]
    cached.chmod(0o644)
    flip(cached, 1001)
    cached.chmod(0o444)
    shutil.rmtree(project.tokens)
    dvc("checkout", "tokenize")
    status = dvc("status", "tokenize")
    handed_out = sha256_file(shard) != good and "up to date" in status
    ended = lab.run(project, "train")
    refused_it = ended.code == 2 and ended.says("train_000.bin", LOOK_AGAIN, "dvc repro -f -s tokenize")
    tally.check(f"handed out {handed_out}: {status} {ended.out[-300:]}", refused_it)
    subprocess.run(LOOK_AGAIN.split(), cwd=project.root, check=True)
    dvc("repro", "-f", "-s", "tokenize")
    shutil.rmtree(project.tokens)
    dvc("checkout", "tokenize")
    ended = lab.run(project, "train")
    mended = sha256_file(shard) == good and sha256_file(cached) == good and ended.code == 0
    tally.check(f"mended: {ended.out[-300:]}", mended, lab.exact(project))
    return tally.outcome()


# --- missing files ------------------------------------------------------------------------------------------------

MISSING = {
    "env-check": {"corpus.txt": "data.path"},
    "prepare-data": {"corpus.txt": "data.path"},
    "tokenize": dict.fromkeys(
        (
            "data/documents",
            "data/documents/manifest.json",
            "data/documents/train.jsonl",
            "data/documents/val.jsonl",
        ),
        "prepare-data",
    ),
    "train": {
        "reports/plan.json": "env_check",
        **dict.fromkeys(
            (
                "data/tokens",
                *("data/tokens/manifest.json", "data/tokens/val_000.bin", "data/tokens/train_000.bin"),
                *("data/tokens/tokenizer/tokenizer.json", "data/tokens/tokenizer/vocab.tiktoken"),
            ),
            "tokenize",
        ),
    },
    "evaluate": {
        "reports/plan.json": "env_check",
        "data/tokens": "tokenize",
        **dict.fromkeys(
            (
                *("models/final", "models/final/config.json", "models/final/model.safetensors"),
                *("reports/train.json", "reports/curve.tsv", "reports/curve_val.tsv"),
            ),
            "train",
        ),
    },
}
"""Of each stage, what it reads, and what the message says is to be run or set."""


@fault("F13", "missing input", times=sum(map(len, MISSING.values())) + 1)
def missing_inputs(lab: Lab, times: int) -> Outcome:
    """One message that names the file and what makes it; exit code 2."""
    tally = Tally()
    for stage, files in MISSING.items():
        for name, remedy in files.items():
            project = trained(lab, "missing") if stage == "evaluate" else lab.project("missing")
            path = project.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            ended = lab.run(project, stage)
            survived = ended.code == 2 and ended.says(Path(name).name, remedy)
            tally.check(f"{stage} without {name}: {ended.code} {ended.out[-300:]}", survived)
    project = Project(
        lab.folder / "no such folder"
    )  # not through the command line, which looks in folders above
    tally.check("no params.yaml", refused(lambda: project.params, "params.yaml", "missing"))
    return tally.outcome()


def trained(lab: Lab, name: str) -> Project:
    """A copy of the undisturbed run."""
    root = lab.folder / name
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(lab.reference(), root)
    return Project(root)


# --- params.yaml --------------------------------------------------------------------------------------------------

MUTATIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt": ({"train": {"max_step": 3}}, "train.max_step: unknown key", "Did you mean 'max_steps'"),
    "a word for a number": ({"seed": "seven"}, "seed: 'seven'", "integer"),
    "a truth for a number": ({"train": {"micro_batch": True}}, "train.micro_batch: True", "integer"),
    "no number": ({"train": {"lr": float("nan")}}, "train.lr: nan", "finite"),
    "far too large": ({"model": {"n_layer": 10**30}}, "model.n_layer: 1000", "1024"),
    "negative": ({"evaluate": {"top_k": -1}}, "evaluate.top_k: -1", "greater than or equal to 0"),
    "a list for a word": ({"data": {"source": ["text"]}}, "data.source: ['text']", "'jsonl'"),
    "two budgets": ({"train": {"max_tokens": 9}}, "train: set exactly one", "max_steps, max_tokens"),
}


@fault("F26", "wrong values in params.yaml", times=len(MUTATIONS))
def wrong_params(lab: Lab, times: int) -> Outcome:
    """Exit code 2 with key, value and what would do. Every key times 13 changes: tests/params/test_mutations.py."""
    tally = Tally()
    project = lab.project("params")
    for name, (sections, *words) in MUTATIONS.items():
        write_params(project.root, **sections)
        ended = lab.run(project, "env-check")
        tally.check(f"{name}: {ended.code} {ended.out[-300:]}", ended.code == 2 and ended.says(*words))
    return tally.outcome()


BUDGET = "train: {max_steps: 1}\n"
MALFORMED: dict[str, tuple[Any, str]] = {
    "not closed": ("a: [1, 2", "line 1"),
    "the same key twice": (BUDGET + "seed: 1\nseed: 2\n", "duplicate key"),
    "a tab": (BUDGET + "\tseed: 1\n", "line 2"),
    "two documents": (BUDGET + "---\n" + BUDGET, "document"),
    "a word of YAML 1.1": (BUDGET + "model: {tie_embeddings: no}\n", "'no' should be a valid boolean"),
    "an alias in itself": ("train: &x [*x]\n", "stands inside what it stands for"),
    "an alias bomb": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
        "10,000",
    ),
    "a deep list": ("[" * 50_000, "nested deeper"),
    "a long file": ("#" * (1 << 20), "KiB"),
    "UTF-16": (BUDGET.encode("utf-16"), "not UTF-8"),
    "binary": (b"\x7fELF\0\0\xff\xfe", "not UTF-8"),
}


@fault("F27", "malformed YAML", times=len(MALFORMED))
def malformed_yaml(lab: Lab, times: int) -> Outcome:
    """Placed by line, and within seconds. Values that DVC reads alike: tests/params/test_yaml.py."""
    from core.params import load_params

    tally = Tally()
    path = lab.folder / "malformed.yaml"
    for name, (content, words) in MALFORMED.items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        start = time.monotonic()
        survived = refused(lambda: load_params(path), path.name, words)
        tally.check(name, survived and time.monotonic() - start < 10)
    return tally.outcome()


TAGS = (
    '!!python/object/apply:os.system ["touch {made}"]',
    '!!python/object/apply:os.mkdir ["{made}"]',
    '!!python/object/new:os.mkdir ["{made}"]',
    '!!python/object/apply:subprocess.check_output [["touch", "{made}"]]',
    "!!python/object/apply:builtins.eval [\"open('{made}', 'w')\"]",
    '!!python/object/apply:builtins.open ["{made}", w]',
    "!!python/object:pathlib.Path {{x: '{made}'}}",
    "!!python/name:os.system",
    "!!python/module:os",
    '!<tag:yaml.org,2002:python/object/apply:os.mkdir> ["{made}"]',
)


@fault("F28", "code in params.yaml", times=len(TAGS))
def code_in_yaml(lab: Lab, times: int) -> Outcome:
    from core.params import load_params

    tally = Tally()
    path, made = lab.folder / "tagged.yaml", lab.folder / "MADE"
    for tag in TAGS:
        path.write_text(f"{BUDGET}seed: {tag.format(made=made.as_posix())}\n", encoding="utf-8")
        survived = refused(lambda: load_params(path), "line 2", "tag")
        tally.check(tag, survived and not made.exists())
        made.rmdir() if made.is_dir() else made.unlink(missing_ok=True)
    return tally.outcome()


# --- bombs --------------------------------------------------------------------------------------------------------


def bomb(made: Path) -> bytes:
    """A pickle that makes a folder when it is loaded."""
    return b"cos\nmkdir\n(S" + repr(made.as_posix()).encode() + b"\ntR."


def zipped_bomb(path: Path, made: Path) -> None:
    """The same as torch.save would write it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", bomb(made)), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", content)


def read_params(project: Project) -> None:
    from core.params import load_params

    load_params(project.root / "params.yaml")


def read_documents(project: Project) -> None:
    from core.tokens import tokenize

    tokenize(project, lambda line: None)


def read_tokens(project: Project) -> None:
    from core.tokens import TokenShards

    TokenShards.open(project.tokens, "train", verify=True)


def read_model(project: Project) -> None:
    from core.run import load_model
    from core.tokenizer import Tokenizer

    load_model(project.final_model)
    Tokenizer.load(project.final_model / "tokenizer")


# What is refused, by the function that reads it.
BOMBED: dict[str, Callable[[Project], None]] = {
    "params.yaml": read_params,
    "data/documents/manifest.json": read_documents,
    "data/documents/train.jsonl": read_documents,
    "data/tokens/manifest.json": read_tokens,
    "data/tokens/train_000.bin": read_tokens,
    "data/tokens/tokenizer/tokenizer.json": read_tokens,
    "data/tokens/tokenizer/vocab.tiktoken": read_tokens,
    "models/final/config.json": read_model,
    "models/final/model.safetensors": read_model,
    "models/final/tokenizer/tokenizer.json": read_model,
}
# What is refused, read as text, or made anew by the command that reads it. A "*" stands for the run's name.
BOMBED_RUNS = {
    "runs/*/0*.safetensors": "train",
    "runs/*/log.jsonl": "train",
    "reports/plan.json": "train",
    "reports/curve.tsv": "evaluate",
    "corpus.txt": "prepare-data",
    "reports/env.json": "env-check",
    "reports/forecasts.json": "env-check",
    "reports/inputs.json": "env-check",
    "reports/train.json": "evaluate",
    "runs/*/run.json": "train",
    "runs/*/best/model.safetensors": "train",
    "runs/*/best/config.json": "train",
}


@fault(
    "F29",
    "a pickle in the place of a file",
    times=2 * len(BOMBED) + 6,
    full=2 * len(BOMBED) + len(BOMBED_RUNS),
)
def bombs(lab: Lab, times: int) -> Outcome:
    """Nothing is unpickled, whatever the file is called: it is refused without a traceback, or not needed."""
    tally = Tally()
    made = lab.folder / "EXPLODED"

    def plant(project: Project, pattern: str, zipped: bool) -> None:
        for file in list(project.root.glob(pattern)) or [project.root / pattern.replace("*", "none")]:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            zipped_bomb(file, made) if zipped else file.write_bytes(bomb(made))

    for pattern, read in BOMBED.items():
        for zipped in (False, True):
            project = trained(lab, "bombed")
            plant(project, pattern, zipped)
            ok = refused(lambda read=read, project=project: read(project))  # type: ignore[misc]
            tally.check(pattern, ok and not made.exists())
    for i, (pattern, command) in enumerate(list(BOMBED_RUNS.items())[: times - tally.tried]):
        project = trained(lab, "bombed")
        plant(project, pattern, bool(i % 2))
        ended = lab.run(project, command)
        survived = ended.code in (0, 2) and ended.says() and not made.exists()
        tally.check(f"{pattern} in {command}: {ended.code} {ended.out[-300:]}", survived)
    return tally.outcome()


# --- paths --------------------------------------------------------------------------------------------------------

OUTSIDE = (
    "../secret.bin",
    "../../secret.bin",
    "/etc/hostname",
    "C:\\secret.bin",
    "..\\secret.bin",
    "./train_000.bin",
)


@fault("F31", "paths that lead outside", times=len(OUTSIDE) + 3)
def traversal(lab: Lab, times: int) -> Outcome:
    """A manifest names its own files only. A corpus may lie anywhere; nothing is written outside the project."""
    from core.tokens import TokenShards

    tally = Tally()
    project = lab.project("paths")
    secret = project.tokens.parent / "secret.bin"
    hostile = lab.folder / "hostile"
    for name in OUTSIDE:
        shutil.copy(project.tokens / "train_000.bin", secret)
        shutil.rmtree(hostile, ignore_errors=True)
        shutil.copytree(project.tokens, hostile)

        def point_outside(manifest: Any, name: str = name) -> None:
            manifest["train"]["shards"][0]["file"] = name

        edit_json(hostile / "manifest.json", point_outside)
        tally.check(
            f"manifest: {name}",
            refused(lambda: TokenShards.open(hostile, "train"), "belongs", "tokenize"),
        )

    outside = lab.folder / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "a.txt").write_text(small_corpus(300, seed=3), encoding="utf-8", newline="\n")
    links = project.root / "corpus"
    links.mkdir()
    with contextlib.suppress(OSError):  # Windows makes links for few
        (links / "linked.txt").symlink_to(outside / "a.txt")
    (links / "b.txt").write_text(small_corpus(300, seed=4), encoding="utf-8", newline="\n")
    for name, path in (
        ("a link", "corpus"),
        ("a path upwards", "../outside"),
        ("an absolute path", str(outside)),
    ):
        before, around = contents(outside), {p.name for p in lab.folder.iterdir()}
        write_params(project.root, data={"path": path})
        ended = lab.run(project, "prepare-data")
        new = {p.name for p in lab.folder.iterdir()} - around - {f"out-{lab.lives}"}
        survived = ended.code == 0 and contents(outside) == before and not new
        tally.check(f"{name}: {ended.code} {ended.out[-200:]} {new}", survived)
    return tally.outcome()


# --- text ---------------------------------------------------------------------------------------------------------

AZ = "Bakının gözəl küçələrində qırmızı şərf və çətir satılır, ığdır."
LINES = "".join(f"line {i} of plain text\n" for i in range(300)).encode()
# What a file holds, what is said of it, and what the manifest counts.
TEXTS: dict[str, tuple[bytes, str, str]] = {
    "bytes that are not UTF-8": (LINES + b"caf\xe9\n", f"0xe9 at offset {len(LINES) + 3}", ""),
    "cp1254": (AZ.replace("ə", "e").encode("cp1254"), "not UTF-8: byte 0xfd at offset 3", ""),
    "cut in a character": (LINES + "ə".encode()[:1], f"0xc9 at offset {len(LINES)}", ""),
    "an encoded surrogate": (LINES + b"\xed\xa0\x80", f"0xed at offset {len(LINES)}", ""),
    "UTF-16": (AZ.encode("utf-16"), "UTF-16", ""),
    "UTF-16 without its mark": ((AZ + "\n").encode("utf-16-le") * 40, "control characters", ""),
    "binary": (b"\x7fELF\x02\x01\x01" + bytes(range(32)) * 40, "control characters", ""),
    "NUL": (LINES + b"a\0b\0c\n", "", "nul"),
    "a byte order mark": (b"\xef\xbb\xbf" + LINES, "", "bom"),
    "CRLF": (LINES.replace(b"\n", b"\r\n"), "", "crlf_lines"),
    "mojibake": (LINES + AZ.encode().decode("latin-1").encode() + b"\n", "", "mojibake_lines"),
}


@fault("F32", "text that is none, or in another encoding", times=len(TEXTS) + 1)
def odd_text(lab: Lab, times: int) -> Outcome:
    """Refused with the offset, or repaired and counted. A lone surrogate never reaches the tokenizer."""
    from core.corpus import prepare, read_documents
    from core.text import replace_surrogates
    from core.tokenizer import Tokenizer

    tally = Tally()
    project = lab.project("text")
    before = contents(project.documents)
    for name, (content, words, counted) in TEXTS.items():
        (project.root / "corpus.txt").write_bytes(content)
        if words:
            survived = refused(lambda: prepare(project, lambda line: None), "corpus.txt", words)
            tally.check(name, survived and contents(project.documents) == before)
            continue
        cleaning = prepare(project, lambda line: None)["cleaning"]
        texts = [t for side in ("train", "val") for t in read_documents(project.documents / f"{side}.jsonl")]
        clean = not any(c in text for text in texts for c in "\0\r\ufeff")
        right = AZ in texts if name == "mojibake" else True
        shutil.rmtree(project.documents)
        shutil.copytree(lab.tokenized() / "data" / "documents", project.documents)
        tally.check(f"{name}: {cleaning}", cleaning[counted] > 0 and clean and right)
    lone = json.loads('"a\\ud800b"')
    ids = Tokenizer.byte().encode(lone)
    survived = replace_surrogates(lone) == ("a\ufffdb", 1) and Tokenizer.byte().decode(ids) == "a\ufffdb"
    tally.check("a lone surrogate", survived)
    return tally.outcome()


@fault("F33", "an empty corpus", times=4)
def empty_corpus(lab: Lab, times: int) -> Outcome:
    """Exit code 2, and the documents that were there stay."""
    tally = Tally()
    project = lab.project("empty")
    before = contents(project.documents)
    for name, content in (("empty", ""), ("blank", " \n\n\t\n"), ("one word", "one"), ("a mark", "\ufeff")):
        (project.root / "corpus.txt").write_text(content, encoding="utf-8")
        ended = lab.run(project, "prepare-data")
        survived = ended.code == 2 and ended.says("data") and contents(project.documents) == before
        tally.check(f"{name}: {ended.code} {ended.out[-200:]}", survived)
    return tally.outcome()


def no_rusage() -> str | None:
    return None if importlib.util.find_spec("resource") else "Windows tells no peak of a process's memory"


MEASURED = """
from pathlib import Path
from core.corpus import prepare
from core.monitor import peak_resident
from core.project import Project
from core.tokens import tokenize
project = Project(Path.cwd())
print(prepare(project, lambda line: None)["train"]["bytes"])
print(tokenize(project, lambda line: None, threads=2)["train"]["bytes"])
print(peak_resident() / 2**20)
"""


@fault("F34", "a line without end", times=2, unless=no_rusage)
def endless_line(lab: Lab, times: int) -> Outcome:
    """Words, and a run of one letter: memory has a bound, and no byte is lost."""
    tally, peaks = Tally(), []
    for name, piece in (("words", small_corpus(2000).replace("\n", " ")), ("one letter", "ə" * 100_000)):
        project = lab.project("line")
        with (project.root / "corpus.txt").open("w", encoding="utf-8", newline="\n") as f:
            f.write(small_corpus(200))
            for _ in range(LINE_MB * 1_000_000 // len(piece.encode())):
                f.write(piece)
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", MEASURED],
            cwd=project.root,
            env=environ,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE,
            check=False,
        )
        prepared, tokenized, peak = (*map(float, done.stdout.split()), 0.0, 0.0, 1e9)[:3]
        peaks.append(round(peak))
        survived = done.returncode == 0 and prepared == tokenized > 0 and peak <= RSS_MB
        tally.check(f"{name}: {done.stdout} {done.stderr[-300:]}", survived)
    return tally.outcome(f"{LINE_MB} MB in a line, at most {max(peaks)} MB held")


@fault("F35", "names of special tokens in the text", times=3)
def special_text(lab: Lab, times: int) -> Outcome:
    """They are text like any other: one `bos` per document, and the text comes back."""
    import numpy as np

    from core.corpus import prepare, read_documents
    from core.tokenizer import BOS, GPT2_BOS, Tokenizer
    from core.tokens import TokenShards, tokenize

    tally, kinds = Tally(), 0
    for kind in ("bpe", "byte", "gpt2"):
        with contextlib.suppress(UserError):  # GPT-2's files may not be on this machine
            Tokenizer.gpt2() if kind == "gpt2" else None
            kinds += 1
            project = lab.project(f"special-{kind}")
            write_params(project.root, tokenizer={"kind": kind, "vocab_size": 320 if kind == "bpe" else None})
            text = "".join(f"{i} {BOS} and {GPT2_BOS}{BOS}\n" for i in range(200))
            (project.root / "corpus.txt").write_text(text, encoding="utf-8", newline="\n")
            prepare(project, lambda line: None)
            manifest = tokenize(project, lambda line: None)
            tokenizer = Tokenizer.load(project.tokens / "tokenizer")
            ids = np.concatenate(TokenShards.open(project.tokens, "train", verify=True).shards)
            texts = list(read_documents(project.documents / "train.jsonl"))
            ends = [*np.flatnonzero(ids == tokenizer.bos), len(ids)]
            back = [tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(ends)]
            tally.check(kind, manifest["train"]["documents"] == len(texts) == len(back) and back == texts)
    return tally.outcome(f"{kinds} of 3 kinds of tokenizer")


# --- places -------------------------------------------------------------------------------------------------------

ODD_FOLDER = "işçi qovluğu ə ş ğ 你 é [1] 100%"
PLACES = {
    "odd in every way": (ODD_FOLDER, {"LC_ALL": "C", "TZ": "XYZ-14:45"}),
    "LC_ALL=C": ("plain", {"LC_ALL": "C", "LANG": "C"}),
    "no UTF-8 anywhere": ("plain", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "blanks and letters of three alphabets": (ODD_FOLDER, {}),
    "a zone half a day away": ("plain", {"TZ": "XYZ-14:45"}),
}
"""Name → folder and environment."""


@fault("F40", "odd locales, time zones and folders", times=1, full=len(PLACES))
def odd_places(lab: Lab, times: int) -> Outcome:
    """Every stage works, and the weights are those of an ordinary place, bit for bit."""
    tally = Tally()
    for name, (folder, environ) in list(PLACES.items())[:times]:
        project = lab.project(folder)
        for made in (project.documents, project.tokens, project.reports):
            shutil.rmtree(made)
        for stage in ("env_check", "prepare_data", "tokenize", "train"):
            ended = fresh(project, stage, **environ)
            if ended.code:
                break
        tally.check(f"{name}: {ended.out[-300:]}", ended.code == 0 and ended.says(), lab.exact(project))
    return tally.outcome()
