"""What several rooms' tests share: a small seeded corpus and a small project."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from core.project import Project

PEOPLE = [
    "the baker",
    "an old sailor",
    "Aysel",
    "the night guard",
    "Emre",
    "my aunt",
    "a tired clerk",
    "Günel",
]
THINGS = [
    "a lantern",
    "the blue door",
    "seven figs",
    "a broken clock",
    "the ferry",
    "warm bread",
    "a red kite",
]
PLACES = [
    "by the harbour",
    "under the bridge",
    "in Şəki",
    "behind the mill",
    "in Muğla",
    "on the roof",
    "at dawn",
]
ACTIONS = ["carried", "forgot", "painted", "hid", "counted", "sold", "repaired", "dreamt of", "waited for"]
AZ_WHO = ["qonşu", "balıqçı", "müəllim", "nənəm", "Əli", "şagird", "çörəkçi"]
AZ_WHAT = ["işıq", "qapı", "yağış", "kitab", "çay", "dəniz", "ulduz", "göl"]
TR_WHO = ["çoban", "öğretmen", "ılık rüzgâr", "İpek", "balıkçı", "komşu", "ağabeyim"]
TR_WHAT = ["ışığı", "yağmuru", "çınarı", "gölgeyi", "şarkıyı", "düşü", "kışı"]


def sample_text(n_bytes: int, seed: int) -> str:
    """At least `n_bytes` of UTF-8 (at most a paragraph more): paragraphs of one line, blank lines between.

    English with Azerbaijani and Turkish sentences; equal arguments give equal text on every machine.
    """
    rng = random.Random(seed)
    paragraphs: list[str] = []
    size = 0
    while size < n_bytes:
        paragraphs.append(" ".join(_sentence(rng) for _ in range(rng.randint(3, 9))))
        size += len(paragraphs[-1].encode()) + 2
    return "\n\n".join(paragraphs) + "\n"


def _sentence(rng: random.Random) -> str:
    pick = rng.choice
    kind = rng.randrange(8)
    if kind < 3:
        sentence = f"{pick(PEOPLE)} {pick(ACTIONS)} {pick(THINGS)} {pick(PLACES)}."
    elif kind < 5:
        sentence = (
            f"when {pick(PEOPLE)} {pick(ACTIONS)} {pick(THINGS)}, {pick(PEOPLE)} laughed {pick(PLACES)}."
        )
    elif kind == 5:
        sentence = f"in {rng.randint(1200, 2100)} there were {rng.randint(2, 99)} boats {pick(PLACES)}."
    elif kind == 6:
        sentence = f"{pick(AZ_WHO)} dedi ki, {pick(AZ_WHAT)} gözəldir, amma {pick(AZ_WHAT)} hələ uzaqdır."
    else:
        sentence = f"{pick(TR_WHO)} bütün gün {pick(TR_WHAT)} düşündü, sonra {pick(TR_WHAT)} unuttu."
    return sentence[0].upper() + sentence[1:]


DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {"source": "text", "path": "corpus.txt", "documents": "lines", "val_fraction": 0.1},
    "tokenizer": {"kind": "bpe", "vocab_size": 512},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32},
    "train": {"max_steps": 8, "batch_tokens": 256, "warmup_steps": 2, "eval_interval": 4, "eval_tokens": 512},
    "evaluate": {"max_tokens": 2048, "n_samples": 1, "sample_tokens": 16},
}
BUDGETS = {"max_steps", "max_tokens", "max_minutes"}


def make_project(tmp_path: Path, **sections: Any) -> Project:
    """A project with small defaults in `tmp_path`; params.yaml is written anew at each call.

    Keys of a section win over the defaults. A `data` section that names a `source` or `path` replaces the default
    one; without it `corpus.txt`, 120 KB of sample_text, is written too. A budget replaces the default budget.
    """
    from ruamel.yaml import YAML

    params: dict[str, Any] = {}
    for name in DEFAULTS | sections:
        base, given = DEFAULTS.get(name, {}), sections.get(name, {})
        if name == "data" and given.keys() & {"source", "path"}:
            base = {}
        if name == "train" and given.keys() & BUDGETS:
            base = {key: value for key, value in base.items() if key not in BUDGETS}
        params[name] = {**base, **given} if isinstance(given, dict) else given
    if params["data"].get("path") == "corpus.txt" and not (tmp_path / "corpus.txt").exists():
        (tmp_path / "corpus.txt").write_text(sample_text(120_000, seed=1), encoding="utf-8", newline="\n")
    with (tmp_path / "params.yaml").open("w", encoding="utf-8", newline="\n") as f:
        YAML(typ="safe", pure=True).dump(params, f)
    return Project(tmp_path)
