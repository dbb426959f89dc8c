"""`auto` learning rate and batch: the law's numbers, what they follow from, and that a user's own stay."""

from __future__ import annotations

from typing import Any

import pytest

from core.laws import batch_tokens, peak_lr
from core.memory.outlook import changed
from core.model_config import ModelConfig
from core.params import Params


def params(**train: Any) -> Params:
    budget = {} if train.keys() & {"max_steps", "max_minutes"} else {"max_tokens": 2_000_000}
    return Params.model_validate({"tokenizer": {"vocab_size": 8192}, "train": {**budget, **train}})


def test_the_laws_give_what_their_paper_says() -> None:
    """Worked out by hand for 1e20 FLOPs from the exponents of arXiv 2401.02954."""
    assert peak_lr(1e20) == pytest.approx(0.000986, rel=0.01)
    assert batch_tokens(1e20) == pytest.approx(1.02e6, rel=0.02)


def test_auto_becomes_numbers_with_a_reason() -> None:
    train = params().train
    assert train.lr == 0.0066 and train.batch_tokens == 4096
    assert "2401.02954" in train.reason("lr") and "2401.02954" in train.reason("batch_tokens")


def test_what_the_user_sets_stays_and_is_named() -> None:
    train = params(lr=1e-3, batch_tokens=1024).train
    assert (train.lr, train.batch_tokens) == (1e-3, 1024)
    assert (train.reason("lr"), train.reason("batch_tokens")) == ("train.lr", "train.batch_tokens")


@pytest.mark.parametrize(
    "budget", [{"max_steps": 3}, {"max_steps": 100_000}, {"max_minutes": 1.0}, {"max_tokens": 1}]
)
@pytest.mark.parametrize("processes", [1, 3])
def test_the_batch_is_whole_sequences_for_every_process(budget: dict[str, Any], processes: int) -> None:
    found = Params.model_validate({"hardware": {"num_processes": processes}, "train": budget})
    block = ModelConfig.resolve(found.model, found.tokenizer.n_vocab).block_size
    sequences, odd = divmod(found.train.batch_tokens, block * processes)
    assert not odd and sequences & (sequences - 1) == 0 and sequences >= 1


def test_steps_and_their_tokens_give_the_same_run() -> None:
    """A batch follows from the tokens, and the tokens of a run in steps from the batch."""
    by_steps = params(max_steps=488).train
    by_tokens = params(max_tokens=488 * by_steps.batch_tokens).train
    assert by_steps.batch_tokens == by_tokens.batch_tokens
    assert by_steps.lr == pytest.approx(by_tokens.lr, rel=0.1)


def test_a_longer_run_has_larger_batches_and_a_lower_rate() -> None:
    short, long = params(max_tokens=1_000_000).train, params(max_tokens=1_000_000_000).train
    assert long.batch_tokens > short.batch_tokens and long.lr < short.lr


def test_the_warm_up_is_a_share_of_a_short_run_and_bounded_in_a_long_one() -> None:
    assert params(max_steps=200).train.warmup_steps == 10
    assert params(max_steps=1).train.warmup_steps == 1
    assert params(max_tokens=2_000_000, batch_tokens=4096).train.warmup_steps == 25
    assert params(max_steps=100_000).train.warmup_steps == 40
    assert params(max_minutes=1.0).train.warmup_steps < params(max_minutes=60.0).train.warmup_steps == 40
    assert params(warmup_steps=0).train.warmup_steps == 0
    assert params(warmup_steps=0).train.reason("warmup_steps") == "train.warmup_steps"


def test_auto_follows_what_is_changed_later() -> None:
    before = params()
    after = changed(before, model={"preset": "124m"}, train={"max_tokens": 2_500_000_000})
    assert after.train.lr < before.train.lr and after.train.batch_tokens > before.train.batch_tokens
    assert before.train.warmup_steps == 25 and after.train.warmup_steps == 40
    mine = changed(after, train={"batch_tokens": 2048})
    assert mine.train.batch_tokens == 2048 and mine.train.reason("batch_tokens") == "train.batch_tokens"
    assert "2401.02954" in mine.train.reason("lr")


def test_sizes_that_do_not_work_are_left_to_the_plan() -> None:
    found = Params.model_validate({"model": {"n_embd": 65}, "train": {"max_tokens": 1000}})
    assert isinstance(found.train.lr, float)
