"""Every key of params.yaml, changed in every way: a valid file, or one line that names key, value and remedy.

The keys are read off the models in core/params.py, so a new one is tried by itself; the rule below says which changes
are right for it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import core
from core.errors import UserError
from core.params import Params, Section, load_params, shortened

REPO = Path(core.__file__).parents[1]
BUDGET = {"train": {"max_steps": 100}}
FULL = Params.model_validate(BUDGET).model_dump()


def walk(section: type[Section] = Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its default; `...` stands for a section."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield prefix + name, ...
            yield from walk(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field.default


KEYS = dict(walk())
MUTATIONS: dict[str, Any] = {
    "text": "oops",
    "negative": -1,
    "zero": 0,
    "nan": math.nan,
    "infinite": math.inf,
    "huge": 1e30,
    "huge integer": 10**30,
    "true": True,
    "null": None,
    "list": [7],
    "mapping": {"oops": 7},
}

# The rule. What is not named here is refused.
ZERO_IS_RIGHT = {
    *("seed", "data.filters.min_chars", "model.dropout", "evaluate.n_samples", "evaluate.temperature"),
    *("evaluate.top_k", "train.beta1", "train.beta2", "train.cooldown", "train.final_lr", "train.grad_clip"),
    *("train.warmup_steps", "train.weight_decay"),
}
# Whether there is such a profile or preset is seen later, by who looks for it.
ANY_TEXT_IS_RIGHT = {"hardware.profile", "model.preset"}


def is_right(key: str, how: str) -> bool:
    """Whether params.yaml is valid after this change of one key."""
    if how in ("delete", "rename"):  # only the budget has no default
        return how == "delete" and key not in ("train", "train.max_steps")
    if how == "null":  # the budget in use has to be a number
        return KEYS[key] is None and key != "train.max_steps"
    if how == "true":
        return (
            isinstance(KEYS[key], bool) or key == "model.tie_embeddings"
        )  # which follows the sizes, if null
    if how == "zero":
        return key in ZERO_IS_RIGHT
    if how == "text":
        return key in ANY_TEXT_IS_RIGHT
    return False


def copy(params: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(params))


def changed(key: str, how: str) -> dict[str, Any]:
    """Params with one change; those without a budget elsewhere get it."""
    params = copy(FULL if how in ("delete", "rename") else BUDGET)
    *sections, name = key.split(".")
    place = params
    for section in sections:
        place = place.setdefault(section, {})
    if how in ("delete", "rename"):
        value = place.pop(name)
        if how == "rename":
            place[f"{name}s"] = value
    else:
        place[name] = MUTATIONS[how]
        if key in ("train.max_tokens", "train.max_minutes"):
            del params["train"]["max_steps"]
            if MUTATIONS[how] is None:
                params["train"]["max_steps"] = 100
    return params


def write(path: Path, params: dict[str, Any]) -> Path:
    text = json.dumps(params, ensure_ascii=False)
    path.write_text(text.replace("NaN", ".nan").replace("Infinity", ".inf"), encoding="utf-8", newline="\n")
    return path


def test_every_key_is_walked() -> None:
    assert len(KEYS) > 60 and {"seed", "data.filters.lowercase", "hardware.strategies.add"} < set(KEYS)
    assert KEYS.keys() >= ZERO_IS_RIGHT | ANY_TEXT_IS_RIGHT, "the rule names keys that exist"


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_is_valid_or_named(tmp_path: Path, key: str) -> None:
    for how in ("delete", "rename", *MUTATIONS):
        path = write(tmp_path / "params.yaml", changed(key, how))
        try:
            params = load_params(path)
        except UserError as error:
            assert not is_right(key, how), f"{how}: {error}"
            check_message(str(error), key, how)
        else:
            assert is_right(key, how), f"{how} of {key} was let through"
            assert isinstance(params, Params)


def check_message(message: str, key: str, how: str) -> None:
    """One line that names the key, the value and what would do; two where `train` is missing and `trains` unknown."""
    title, *lines = message.split("\n")
    line = lines[-1]
    assert title == "params.yaml has problems:"
    assert len(lines) == (2 if (key, how) == ("train", "rename") else 1), message
    if key == "train.max_steps" and how in ("delete", "null"):
        assert line == "  - train: set exactly one of max_steps, max_tokens, max_minutes (set: none)"
    elif how == "delete":
        assert line == f"  - {key}: missing; add it, as in `{key}: {{key: value}}`"
    elif how == "rename":
        name = key.split(".")[-1]
        assert line.startswith(f"  - {key}s: unknown key. Did you mean {name!r}? Known here: "), line
    elif how == "mapping" and KEYS[key] is ...:
        assert line.startswith(f"  - {key}.oops: unknown key. Known here: "), line
    elif how == "mapping" and key == "hardware.options":
        assert line == "  - hardware.options.oops: 7; should hold keys, as in `oops: {key: value}`"
    else:
        value, holds_keys = MUTATIONS[how], KEYS[key] is ... or key == "hardware.options"
        if isinstance(value, list) and isinstance(KEYS[key], list):  # a list is right, its items are not
            value = value[0]
        shown = "is empty" if value is None and holds_keys else shortened(value)
        assert line.startswith(f"  - {key}") and f": {shown}" in line, line
        assert " should " in line or "; set it to " in line, line


def test_reading_params_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "params.yaml", {"train": {"max_steps": "x"}})
    code = (
        f"import sys; sys.path.insert(0, {str(REPO)!r}); from pathlib import Path\n"
        "from core.params import load_params\n"
        f"try: load_params(Path({str(path)!r}))\n"
        "except Exception as e: print(type(e).__name__)\n"
        "print({'torch', 'numpy', 'datasets', 'accelerate', 'dvc'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["UserError", "set()"]
