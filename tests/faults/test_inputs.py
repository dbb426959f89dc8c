"""That the rehearsals of broken input would notice: the bombs go off, the damage is damage, the remedy is a remedy."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from core.errors import UserError
from core.selftest import inputs
from core.selftest.lab import FAULTS
from core.tokens import LOOK_AGAIN, TokenShards, remedy


def test_the_rows_are_entered() -> None:
    ids = {f"F{n}" for n in (11, 12, 13, 26, 27, 28, 29, 31, 32, 33, 34, 35, 40)}
    assert {name for name, fault in FAULTS.items() if fault.rehearse.__module__ == inputs.__name__} == ids


def test_a_bomb_goes_off_where_it_is_unpickled(tmp_path: Path) -> None:
    made = tmp_path / "made"
    pickle.loads(inputs.bomb(made))
    assert made.is_dir()


def test_a_zipped_bomb_goes_off_in_torch_load(tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "model.pt"
    inputs.zipped_bomb(path, made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert made.is_dir()


@pytest.mark.parametrize("name", inputs.DAMAGE)
def test_damage_of_tokens_is_seen_and_only_then(tokenized: Path, tmp_path: Path, name: str) -> None:
    tokens = tmp_path / "tokens"
    shutil.copytree(tokenized / "data" / "tokens", tokens)
    for split in ("train", "val"):
        TokenShards.open(tokens, split, verify=True)
    damage, file = inputs.DAMAGE[name]
    damage(tokens)
    with pytest.raises(UserError, match=file) as e:
        for split in ("train", "val"):
            TokenShards.open(tokens, split, verify=True)
    assert e.value.exit_code == 2 and remedy("tokenize") in str(e.value)


@pytest.mark.parametrize("name", ["a flipped bit", "an id beyond the vocabulary", "another tokenizer"])
def test_damage_that_sizes_do_not_show(tokenized: Path, tmp_path: Path, name: str) -> None:
    """Why training reads every byte first."""
    tokens = tmp_path / "tokens"
    shutil.copytree(tokenized / "data" / "tokens", tokens)
    inputs.DAMAGE[name][0](tokens)
    TokenShards.open(tokens, "train")


def test_the_remedy_is_a_command_of_this_system() -> None:
    """Its effect is rehearsed as F12, through DVC."""
    assert f"`{LOOK_AGAIN}`" in remedy("tokenize") and "`dvc repro -f -s tokenize`" in remedy("tokenize")
    assert shutil.which(LOOK_AGAIN.split()[0])


def test_every_planted_file_is_one_that_there_is(tokenized: Path) -> None:
    before_training = [p for p in inputs.BOMBED if p.startswith(("data", "params"))]
    assert len(before_training) > 6
    for pattern in before_training:
        assert (tokenized / pattern).is_file(), pattern
    for stage in ("env-check", "prepare-data", "tokenize"):
        for name in inputs.MISSING[stage]:
            assert (tokenized / name).exists(), name
