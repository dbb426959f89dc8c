"""Data order: every window once per epoch, a pure function of seed and position."""

from __future__ import annotations

import pickle
from itertools import islice, pairwise

import numpy as np
import pytest

from core.batches import Positions, Windows, held_out_batches


class Shards:
    """Token shards in memory: consecutive numbers, so that a token tells where it came from."""

    def __init__(self, *lengths: int) -> None:
        starts = np.cumsum([0, *lengths])
        self.shards = [np.arange(a, b, dtype=np.uint16) for a, b in pairwise(starts)]
        self.n_tokens = sum(lengths)


T = 8


def test_an_epoch_visits_every_window_once():
    windows = Windows(Shards(1000, 300), T, seed=1)
    starts = [windows[p][0][0] for p in range(windows.per_epoch)]
    assert len(set(starts)) == windows.per_epoch == (1000 - T) // T + (300 - T) // T
    assert max(np.diff(sorted(s for s in starts if s < 1000))) == T


def test_targets_are_inputs_one_later():
    x, y = Windows(Shards(1000), T, seed=1)[17]
    assert x.dtype == np.int64 and len(x) == T
    assert np.array_equal(y, x + 1)


def test_epochs_differ_in_order_and_offset():
    windows = Windows(Shards(1000), T, seed=1)
    n = windows.per_epoch
    epochs = [[int(windows[e * n + p][0][0]) for p in range(n)] for e in range(6)]
    assert len({tuple(e) for e in epochs}) == 6
    assert len({min(e) for e in epochs}) > 1


def test_position_alone_decides():
    one, two = Windows(Shards(1000, 64), T, seed=1), Windows(Shards(1000, 64), T, seed=1)
    order = np.random.default_rng(0).permutation(400)
    backwards = {int(p): one[int(p)][0] for p in order}
    assert all(np.array_equal(two[p][0], backwards[p]) for p in range(400))
    assert any(not np.array_equal(Windows(Shards(1000, 64), T, seed=2)[p][0], backwards[p]) for p in range(5))


@pytest.mark.parametrize("length", range(T + 1, 3 * T + 2))
def test_short_shards_stay_inside(length):
    windows = Windows(Shards(length), T, seed=3)
    for p in range(50 * windows.per_epoch):
        x, y = windows[p]
        assert len(x) == T and x[0] >= 0 and y[-1] < length


def test_micro_batch_and_processes_do_not_change_what_a_step_sees():
    windows = Windows(Shards(1000), T, seed=1)

    def step_tokens(micro_batch, processes):
        rows = []
        for rank in range(processes):
            share = 12 // processes // micro_batch
            for micro in islice(Positions(12, micro_batch, rank, processes, first_step=5), share):
                rows += [tuple(x) for x in windows.__getitems__(micro)[0]]
        return sorted(rows)

    whole = step_tokens(12, 1)
    assert len(whole) == 12
    assert step_tokens(1, 1) == step_tokens(4, 1) == step_tokens(3, 2) == step_tokens(2, 3) == whole


def test_positions_go_on_from_a_step():
    assert list(islice(Positions(4, 2, first_step=3), 2)) == list(islice(Positions(4, 2), 8))[6:]


def test_pickles_without_its_epoch():
    windows = Windows(Shards(1000), T, seed=1)
    expected = windows[3][0]
    copy = pickle.loads(pickle.dumps(windows))
    assert copy._epoch is None
    assert np.array_equal(copy[3][0], expected)


@pytest.mark.parametrize("lengths", [(100,), (97, 41), (9,), (5,), (100, 2)])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_held_out_predicts_every_token_once(lengths, batch):
    shards = Shards(*lengths)
    targets = [int(t) for _, y in held_out_batches(shards, T, batch, None) for t in y.ravel()]
    expected = [int(t) for shard in shards.shards for t in shard[1:]]
    assert targets == expected


@pytest.mark.parametrize("limit", [1, 8, 20, 64])
def test_held_out_limit(limit):
    ys = [y for _, y in held_out_batches(Shards(1000), T, 4, limit)]
    assert limit <= sum(y.size for y in ys) < limit + T
