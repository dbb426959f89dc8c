"""The caching allocator without a card: each rule by itself, and what must hold after any stream of requests."""

from __future__ import annotations

import random

import pytest

from core.memory.allocator import MIB, AllocatorSettings, Block, CachingAllocator, OutOfMemory

EXPANDABLE = AllocatorSettings(expandable_segments=True)
SPLIT_64 = AllocatorSettings(max_split_bytes=64 * MIB)


def taken(allocator: CachingAllocator, nbytes: float) -> Block:
    block = allocator.malloc(int(nbytes))
    assert block is not None
    return block


def reserved_after(*sizes: float, settings: AllocatorSettings | None = None) -> float:
    """MiB reserved for these requests [MiB], none of them given back."""
    allocator = CachingAllocator(settings=settings)
    for size in sizes:
        taken(allocator, size * MIB)
    return allocator.reserved / MIB


# ---- rounding and pools


@pytest.mark.parametrize(("asked", "given"), [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB)])
def test_requests_are_rounded_up_to_512_bytes(asked: int, given: int) -> None:
    allocator = CachingAllocator()
    assert taken(allocator, asked).size == allocator.allocated == given


def test_nothing_is_nothing() -> None:
    allocator = CachingAllocator()
    assert allocator.malloc(0) is None
    allocator.free(None)
    assert (allocator.allocated, allocator.reserved) == (0, 0)


@pytest.mark.parametrize(
    ("mib", "segment"),
    [
        (1 / 1024, 2),
        (1, 2),  # the last of the small pool
        (1.001, 20),
        (9.99, 20),
        (10, 10),  # from here on a segment of its own
        (10.001, 12),
        (11, 12),
        (500.5, 502),
    ],
)
def test_segment_sizes(mib: float, segment: float) -> None:
    assert reserved_after(mib) == segment


def test_small_and_large_requests_share_no_segment() -> None:
    assert reserved_after(1, 1) == 2
    assert reserved_after(1, 1, 1) == 4
    assert reserved_after(5, 5, 5, 5) == 20
    assert reserved_after(5, 5, 5, 1) == 22  # 5 MiB are left in the large segment


# ---- splitting, merging, best fit


def test_what_is_left_of_a_block_is_split_off_where_it_is_worth_it() -> None:
    allocator = CachingAllocator()
    assert taken(allocator, 18.5 * MIB).size == 18.5 * MIB  # 1.5 MiB are left of 20
    assert taken(allocator, 1.25 * MIB).size == 1.5 * MIB  # 0.25 MiB are not worth a block of the large pool
    assert allocator.reserved == 20 * MIB == allocator.allocated
    small = CachingAllocator()
    sizes = [taken(small, nbytes).size for nbytes in (MIB - 512, MIB - 512, 512, 512)]
    assert sizes == [MIB - 512, MIB - 512, 512, 512] and small.reserved == 2 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 3, 0, 2)])
def test_free_neighbours_become_one_block(order: tuple[int, ...]) -> None:
    allocator = CachingAllocator()
    blocks = [taken(allocator, 5 * MIB) for _ in range(4)]
    for i in order:
        allocator.free(blocks[i])
    assert allocator.allocated == 0
    assert taken(allocator, 20 * MIB).size == allocator.reserved == 20 * MIB


def test_blocks_in_use_are_not_merged() -> None:
    allocator = CachingAllocator()
    blocks = [taken(allocator, 5 * MIB) for _ in range(4)]
    for i in (0, 2):
        allocator.free(blocks[i])
    taken(allocator, 9 * MIB)  # 10 MiB are free, but not in one piece
    assert allocator.reserved == 40 * MIB


def test_the_smallest_block_that_is_large_enough() -> None:
    allocator = CachingAllocator()
    large, small = taken(allocator, 40 * MIB), taken(allocator, 30 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert taken(allocator, 30 * MIB).address == small.address
    assert taken(allocator, 30 * MIB).address == large.address
    assert allocator.reserved == 70 * MIB


def test_peaks_stay_when_memory_is_given_back() -> None:
    allocator = CachingAllocator()
    for block in [taken(allocator, 30 * MIB), taken(allocator, 50 * MIB)]:
        allocator.free(block)
    assert (allocator.allocated, allocator.peak_allocated) == (0, 80 * MIB)
    assert (allocator.reserved, allocator.peak_reserved) == (80 * MIB, 80 * MIB)
    allocator.release_cached()
    assert (allocator.reserved, allocator.peak_reserved, allocator.retries) == (0, 80 * MIB, 0)


# ---- under a limit


def test_unused_segments_are_given_back_before_it_gives_up() -> None:
    allocator = CachingAllocator(limit=50 * MIB)
    allocator.free(taken(allocator, 30 * MIB))
    kept = taken(allocator, 10 * MIB)  # out of the 30
    assert allocator.reserved == 30 * MIB
    allocator.free(kept)
    block = taken(allocator, 40 * MIB)
    assert (allocator.retries, allocator.reserved, allocator.peak_reserved) == (1, 40 * MIB, 40 * MIB)
    allocator.free(block)
    taken(allocator, 50 * MIB)
    assert (allocator.retries, allocator.reserved) == (2, 50 * MIB)


def test_a_segment_in_use_cannot_be_given_back() -> None:
    allocator = CachingAllocator(limit=50 * MIB)
    whole = taken(allocator, 30 * MIB)
    allocator.free(whole)
    kept = taken(allocator, 10 * MIB)
    with pytest.raises(OutOfMemory, match=f"{40 * MIB} bytes wanted, {30 * MIB} of {50 * MIB} reserved"):
        allocator.malloc(40 * MIB)
    assert (allocator.retries, allocator.reserved, allocator.allocated) == (1, 30 * MIB, 10 * MIB)
    allocator.free(kept)
    taken(allocator, 40 * MIB)  # it goes on


def test_the_limit_itself_may_be_reserved() -> None:
    taken(CachingAllocator(limit=40 * MIB), 40 * MIB)
    with pytest.raises(OutOfMemory):
        CachingAllocator(limit=40 * MIB - 1).malloc(40 * MIB)
    with pytest.raises(OutOfMemory):  # a segment has 2 MiB, whatever is asked of it
        CachingAllocator(limit=MIB).malloc(1)


# ---- expandable segments


def test_one_segment_grows_by_granules() -> None:
    allocator = CachingAllocator(settings=EXPANDABLE)
    first = taken(allocator, 30 * MIB)
    assert (allocator.reserved, first.size) == (40 * MIB, 30 * MIB)
    second = taken(allocator, 25 * MIB)  # begins in the 10 MiB that are left
    assert allocator.reserved == 60 * MIB and second.address == first.address + first.size
    taken(allocator, 1)
    assert allocator.reserved == 62 * MIB  # a segment of the small pool


def test_growing_tensors_do_not_fragment_it() -> None:
    def reserved(settings: AllocatorSettings) -> float:
        allocator = CachingAllocator(settings=settings)
        for size in range(20, 200, 20):
            allocator.free(taken(allocator, size * MIB))
        return allocator.reserved / MIB

    assert reserved(EXPANDABLE) == 180
    assert reserved(AllocatorSettings()) == sum(range(20, 200, 20))


def test_its_end_is_given_back_in_granules() -> None:
    allocator = CachingAllocator(limit=110 * MIB, settings=EXPANDABLE)
    kept, end = taken(allocator, 30 * MIB), taken(allocator, 70 * MIB)
    allocator.free(end)
    allocator.release_cached()
    assert allocator.reserved == 40 * MIB
    allocator.free(kept)
    allocator.release_cached()
    assert allocator.reserved == 0
    assert taken(allocator, 100 * MIB).size == allocator.reserved == 100 * MIB


def test_a_retry_extends_what_the_release_has_left() -> None:
    allocator = CachingAllocator(limit=90 * MIB, settings=EXPANDABLE)
    small = [taken(allocator, MIB) for _ in range(2)]
    taken(allocator, 30 * MIB)
    allocator.free(taken(allocator, 10 * MIB))
    for block in small:
        allocator.free(block)
    taken(allocator, 50 * MIB)  # 40 more at the end, for which the small pool must go
    assert (allocator.retries, allocator.reserved) == (1, 80 * MIB)
    with pytest.raises(OutOfMemory):
        allocator.malloc(12 * MIB)


def test_torch_holds_the_whole_request_against_the_limit() -> None:
    """Even where the free end of the segment would do for a part: CUDACachingAllocator.cpp, alloc_block."""
    allocator = CachingAllocator(limit=100 * MIB, settings=EXPANDABLE)
    taken(allocator, 30 * MIB)
    allocator.free(taken(allocator, 10 * MIB))
    assert allocator.reserved == 40 * MIB
    with pytest.raises(OutOfMemory):
        allocator.malloc(62 * MIB)  # 52 are missing, 92 in all would fit
    assert allocator.retries == 1


# ---- max_split_size


def test_a_block_beyond_the_split_size_stays_whole() -> None:
    allocator = CachingAllocator(settings=SPLIT_64)
    large = taken(allocator, 100 * MIB)
    allocator.free(large)
    taken(allocator, 20 * MIB)  # would split it
    assert allocator.reserved == 120 * MIB
    assert taken(allocator, 90 * MIB) is large  # near enough: 10 MiB are wasted
    assert large.size == 100 * MIB and allocator.reserved == 120 * MIB


def test_a_block_far_too_large_is_not_wasted() -> None:
    allocator = CachingAllocator(settings=SPLIT_64)
    allocator.free(taken(allocator, 100 * MIB))
    taken(allocator, 80 * MIB)  # 20 MiB or more would be wasted
    assert allocator.reserved == 180 * MIB


def test_blocks_below_the_split_size_are_split_as_ever() -> None:
    assert reserved_after(5, 5, 5, settings=SPLIT_64) == 20
    allocator = CachingAllocator(settings=SPLIT_64)
    allocator.free(taken(allocator, 60 * MIB))
    taken(allocator, 20 * MIB)
    taken(allocator, 40 * MIB)
    assert allocator.reserved == 60 * MIB


# ---- settings


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", AllocatorSettings()),
        ("expandable_segments:True", EXPANDABLE),
        ("expandable_segments:False", AllocatorSettings()),
        ("max_split_size_mb:64", SPLIT_64),
        (" max_split_size_mb: 64 , garbage_collection_threshold:0.8", SPLIT_64),
        ("max_split_size_mb:64,expandable_segments:True", AllocatorSettings(True, 64 * MIB)),
        ("backend:cudaMallocAsync", AllocatorSettings()),
        ("roundup_power2_divisions:[256:1,512:2],max_split_size_mb:64", SPLIT_64),
        ("max_split_size_mb:many", AllocatorSettings()),
        ("nonsense", AllocatorSettings()),
    ],
)
def test_what_the_environment_says(text: str, settings: AllocatorSettings) -> None:
    assert AllocatorSettings.parse(text) == settings


def test_expandable_segments_ignore_the_split_size() -> None:
    both = AllocatorSettings(True, 64 * MIB)
    for sizes in ((100, 20, 90), (5, 200, 5)):
        assert reserved_after(*sizes, settings=both) == reserved_after(*sizes, settings=EXPANDABLE)


# ---- any stream of requests


def assert_sound(allocator: CachingAllocator, alive: list[Block]) -> None:
    """Blocks tile their segments, no two free ones are neighbours, and every counter is right."""
    assert allocator.allocated == sum(block.size for block in alive) <= allocator.reserved
    heads = set(allocator.heads)
    free = [entry[2] for pool in (allocator.small, allocator.large) for entry in pool.free]
    for block in (*alive, *free):
        while block.before is not None:
            block = block.before
        heads.add(block)
    seen = []
    for block in heads:
        seen.append(block)
        while (after := block.after) is not None:
            assert after.before is block and after.address == block.address + block.size
            assert not (block.free and after.free)
            seen.append(after)
            block = after
    assert sum(block.size for block in seen) == allocator.reserved
    assert {id(b) for b in seen if b.free} == {id(b) for b in free}
    assert {id(b) for b in seen if not b.free} == {id(b) for b in alive}
    for pool in (allocator.small, allocator.large):
        assert pool.free == sorted(pool.free, key=lambda entry: entry[:2])
        assert all(entry[:2] == (entry[2].size, entry[2].address) for entry in pool.free)


@pytest.mark.parametrize("limit", [None, 200 * MIB])
@pytest.mark.parametrize(
    "settings", [AllocatorSettings(), EXPANDABLE, SPLIT_64], ids=["plain", "expandable", "split"]
)
@pytest.mark.parametrize("seed", range(4))
def test_counters_and_neighbours(settings: AllocatorSettings, limit: int | None, seed: int) -> None:
    rng, allocator = random.Random(seed), CachingAllocator(limit, settings)
    alive: list[Block] = []
    refused = 0
    for _ in range(1000):
        if alive and rng.random() < 0.45:
            allocator.free(alive.pop(rng.randrange(len(alive))))
        else:
            try:
                alive.append(taken(allocator, rng.choice((2e3, 5e5, 3e6, 2e7, 1e8)) * rng.uniform(0.1, 1)))
            except OutOfMemory:
                refused += 1
        assert_sound(allocator, alive)
        assert limit is None or allocator.reserved <= limit
        assert allocator.peak_allocated <= allocator.peak_reserved
    assert bool(refused) == (limit is not None) == bool(allocator.retries)
    for block in alive:
        allocator.free(block)
    allocator.release_cached()
    assert (allocator.allocated, allocator.reserved) == (0, 0)
