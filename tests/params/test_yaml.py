"""Reading params.yaml: the values that DVC reads, and files that were made to hurt."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import parse_yaml

from core import params
from core.errors import UserError
from core.params import MAX_BYTES, MAX_DEPTH, MAX_NODES, load_params

BUDGET = "train: {max_steps: 1}\n"

# What YAML 1.1, 1.2 and readers of either take differently.
LITERALS = [
    *("3e-4", "1E5", "1e5", "1.e+3", "1.5", ".5", "5.", "-.5", "+1.5", "1_000.5", "6.02e+23", "1e-05"),
    *("0", "-0", "010", "0o10", "0x1F", "0b11", "1_000", "+7", "08", "12:30:45", "1:30", "190:20:30"),
    *(".nan", ".NaN", ".inf", "-.INF", "nan", "inf", "1e400", "infinity"),
    *("yes", "no", "on", "off", "y", "n", "true", "True", "TRUE", "false", "tRue"),
    *("null", "Null", "NULL", "~", "", "None", "nil"),
    *("2024-01-02", "2024-01-02T03:04:05Z", "2024-1-2", "1.2.3", "=", "<<", "-", "'3'", '"no"', '"\\u0259"'),
]


def load(tmp_path: Path, content: str | bytes) -> params.Params:
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_params(path)


def refusal(tmp_path: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and message.startswith("params.yaml")
    assert len(message) < 12_000 and all(c.isprintable() or c == "\n" for c in message)
    return message


# --- the values that DVC reads ------------------------------------------------------------------------------------


def read(path: Path, reader: Any) -> Any:
    try:
        return reader()
    except Exception:  # each has its own errors
        return "refused"


@pytest.mark.parametrize("literal", LITERALS)
def test_literals_are_read_as_dvc_reads_them(tmp_path: Path, literal: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"a: {literal}\nb: [{literal}]\n", encoding="utf-8", newline="\n")
    ours = read(path, lambda: params._read_yaml(path))
    theirs = read(path, lambda: parse_yaml(path.read_text(encoding="utf-8"), path))
    assert repr(ours) == repr(theirs)  # repr tells 1 from 1.0 and from True, and nan equals itself


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2\n",
        "a: {b: 1, b: 1}\n",
        "a: &x {b: 1}\nc: {<<: *x, b: 2}\n",
        "a: &x 1\nb: *x\n",
        "a: *x\n",
        "\ta: 1\n",
        "a:\t1\n",
        "a: 1\n\tb: 2\n",
        "a: [1,\n\t2]\n",
        "a: [1, 2\n",
        "a: |\n  x\n  y\n",
        "a: >\n  x\n  y\n\n",
        "? a\n: 1\n",
        "a: 'it''s'\n",
        "a: 1 # no comment\nb: x#y\n",
        "%YAML 1.1\n---\na: no\nb: 010\n",
        "a: @x\n",
        "a: !!str 3\nb: !!float 1\n",
        "a: !!set {x, y}\n",
        "[a, b]: 1\n",
        "a: b: c\n",
    ],
)
def test_documents_are_read_as_dvc_reads_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8", newline="\n")
    ours, theirs = read(path, lambda: params._read_yaml(path)), read(path, lambda: parse_yaml(text, path))
    assert repr(ours) == repr(theirs)


# --- nothing is executed ------------------------------------------------------------------------------------------

PAYLOADS = [
    '!!python/object/apply:os.system ["touch PWNED"]',
    '!!python/object/apply:os.system\n  args: ["touch PWNED"]',
    '!!python/object/apply:subprocess.check_output [["touch", "PWNED"]]',
    "!!python/object/apply:builtins.eval [\"open('PWNED', 'w')\"]",
    "!!python/object/new:type [x, !!python/tuple [], {extend: !!python/name:exec }]",
    '!!python/object/new:os.mkdir ["PWNED"]',
    "!!python/object:pathlib.Path {x: PWNED}",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    '!<tag:yaml.org,2002:python/object/apply:os.mkdir> ["PWNED"]',
    '{!!python/object/apply:os.mkdir ["PWNED"]: 1}',
    '[&x !!python/object/apply:os.mkdir ["PWNED"], *x]',
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_tags_execute_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path, f"{BUDGET}hardware: {{options: {{x: {{y: 1}}}}}}\nseed: {payload}\n")
    assert "line 3" in message and "tag" in message
    message = refusal(
        tmp_path, f'%TAG ! tag:yaml.org,2002:python/\n---\n{BUDGET}seed: !object/apply:os.mkdir ["PWNED"]\n'
    )
    assert "tag" in message
    assert [p.name for p in tmp_path.iterdir()] == ["params.yaml"]


# --- files that were made to hurt ---------------------------------------------------------------------------------


def bomb(width: int, depth: int) -> str:
    """A few hundred bytes that stand for width^depth words."""
    lines = [f"a0: &a0 [{', '.join(['lol'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


def tall(levels: int) -> str:
    """Each alias stands for two levels more."""
    return "a0: &a0 [[1]]\n" + "".join(f"a{i}: &a{i} [[*a{i - 1}]]\n" for i in range(1, levels // 2))


HOSTILE = {
    "large": ("# " + "x" * MAX_BYTES + "\n", "256 KiB"),
    "deep list": ("[" * 100_000, "nested deeper than 20"),
    "deep mapping": ("{a: " * 30_000, "nested deeper than 20"),
    "deep block": ("".join(" " * i + "a:\n" for i in range(500)), "nested deeper than 20"),
    "deep through aliases": (tall(60), "nested deeper than 20"),
    "alias in itself": ("train: &x [*x]\n", "line 1, column 12: the alias *x stands inside"),
    "alias in its mapping": ("train: &x {a: {b: *x}}\n", "the alias *x stands inside"),
    "merge of itself": ("train: &x {<<: *x}\n", "the alias *x stands inside"),
    "alias bomb": (bomb(10, 9), "more than 10,000 keys and values"),
    "wide alias bomb": (bomb(100, 3), "more than 10,000 keys and values"),
    "merge bomb": (bomb(10, 9).replace("a0: &a0 [" + "lol, " * 9 + "lol]", "a0: &a0 {x: 1}"), "more than 10,000"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(MAX_NODES)), "more than 10,000"),
    "many numbers": ("seed: [" + "1," * MAX_NODES + "]", "more than 10,000"),
    "long key": ("? " + "k" * 50_000 + "\n: 1\n" + BUDGET, "unknown key"),
    "long value": (f"{BUDGET}seed: {'x' * 50_000}\n", "seed: 'xxx"),
    "long number": (f"{BUDGET}seed: 0x{'f' * 50_000}\n", "seed: <integer of 200000 bits>"),
    "longer number than Python prints": (f"{BUDGET}seed: {'9' * 5000}\n", "4300"),
    "long list": (f"{BUDGET}seed: [{'1,' * 900}]\n", "seed: [1, 1, 1, 1, 1, 1, ...]"),
    "long duplicate": (f"seed: {'x' * 40_000}\nseed: {'y' * 40_000}\n", "duplicate key"),
    "many problems": (BUDGET + "".join(f"k{i}: 1\n" for i in range(900)), "and 870 more"),
    "control characters": (f'{BUDGET}"\\e[2Jk\\n": 1\n', "unknown key"),
    "NUL": (f'{BUDGET}data: {{split: "\\0"}}\n', "data.split: '\\x00' should be text without NUL"),
    "surrogate": (f'{BUDGET}evaluate: {{prompts: ["\\ud800"]}}\n', "evaluate.prompts.0: '\\ud800' should be text"),
    "date option": (f"{BUDGET}hardware: {{options: {{a: {{b: [2024-01-01]}}}}}}\n", "hardware.options.a.b: [datetime"),
    "nan option": (f"{BUDGET}hardware: {{options: {{a: {{b: {{c: .nan}}}}}}}}\n", "hardware.options.a.b: {'c': nan}"),
    "bad value of a tag": (f"{BUDGET}seed: !!int x\n", "cannot read (ValueError"),
    "bad date": (f"{BUDGET}seed: 2024-99-99\n", "cannot read (ValueError: month"),
    "binary": (b"\x7fELF\x02\x01\x01\x00" + bytes(range(256)), "not UTF-8 at byte"),
    "a pickle": (b"cos\nsystem\n(S'touch PWNED'\ntR.", "params.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE[name]
    message = refusal(tmp_path, content)
    assert words in message, message


@pytest.mark.parametrize("name", ["alias bomb", "deep list", "large", "a gigabyte"])
def test_refusing_takes_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    with path.open("wb") as f:
        if name in HOSTILE:
            f.write(str(HOSTILE[name][0]).encode())
        else:
            f.truncate(1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            load_params(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_what_a_real_file_needs_is_let_through(tmp_path: Path) -> None:
    deep = "1"
    for _ in range(MAX_DEPTH - 4):
        deep = f"[{deep}]"
    text = f"hardware: {{options: {{a: {{b: {deep}, c: &c {{d: 1}}, e: *c, f: *c}}}}}}\n"
    options = load(tmp_path, BUDGET + text).hardware.options["a"]
    assert options["e"] == options["f"] == {"d": 1}
    with pytest.raises(UserError, match="nested deeper than 20"):
        load(tmp_path, (BUDGET + text).replace(deep, f"[[{deep}]]"))
    prompts = load(tmp_path, f"{BUDGET}evaluate: {{prompts: [{'x, ' * 5000}]}}\n").evaluate.prompts
    assert len(prompts) == 5000
