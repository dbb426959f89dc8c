"""One checkpoint file, and the row of them that a run keeps: whole and durable, or refused by name.

The stored checkpoint of format 1 was written by `write_fixture` below: from the repository's root,
`PYTHONPATH=.:tests/training python -c "import test_checkpoint; test_checkpoint.write_fixture()"`.
It stays as it is, as a later version has to go on from what an earlier one wrote: change FORMAT where that
cannot be.
"""

from __future__ import annotations

import _thread
import errno
import json
import os
import shutil
import stat
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from core import checkpoint, faults
from core.checkpoint import (
    DTYPES,
    HEADER_MAX,
    KEEP,
    Damaged,
    listing,
    newest,
    position,
    read,
    require_room,
    save,
    size,
    verified_header,
    write_tensors,
)
from core.errors import MediaError, UserError
from core.files import private, sha256_file
from core.project import Project
from core.selftest.lab import Lab

REPO = Path(__file__).parents[2]
FIXTURE = REPO / "tests" / "faults" / "fixtures" / "format-1" / "000000002-000002.safetensors"
TENSORS = {"model/w": torch.arange(6.0).reshape(2, 3), "optimizer/step/w": torch.tensor(3.0)}


def small(lab: Lab) -> Project:
    """The lab's small project, smaller still."""
    return lab.project("fixture", model={"n_head": 1, "n_embd": 4})


def write_fixture() -> None:
    """Stop the small project after the first micro-batch of its third step, and keep its checkpoint."""
    with Lab.open(Path(tempfile.gettempdir()), REPO / "plugins") as lab:
        project = small(lab)
        lab.run(project, "train", faults="train.backward=interrupt@9")
        (path,) = project.runs.rglob(FIXTURE.name)
        FIXTURE.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, FIXTURE)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.disarm()


def filled(folder: Path, *steps: int) -> Path:
    """The folder, with a checkpoint of each step."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        save(folder, step, 0, TENSORS, {})
    return folder


def steps(folder: Path) -> list[int]:
    return [position(path)[0] for path in listing(folder)]


def found(folder: Path, differences: Callable[[Any], list[str]] = lambda state: []) -> tuple[Any, list[str]]:
    """What `newest` returns and says."""
    said: list[str] = []
    return newest(folder, differences, said.append), said


# --- one file -----------------------------------------------------------------------------------------------


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return checkpoint._bytes(a).tobytes() == checkpoint._bytes(b).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    values = torch.tensor([0.0, 1.0, 0.5, 3.0, 96.0, 1.0]).to(getattr(torch, dtype))
    tensors = {
        "vector": values,
        "matrix": values.reshape(2, 3),
        "scalar": values[3],
        "empty": values[:0],
        "empty matrix": values.reshape(2, 3)[:, :0],
        "transposed": values.reshape(2, 3).t(),
        "every other": values[::2],
    }
    assert tensors["scalar"].dim() == 0 and not tensors["transposed"].is_contiguous()
    path = save(tmp_path, 1, 0, tensors, {})
    back = {name: t.clone() for name, t in read(path).tensors()}
    assert back.keys() == tensors.keys()
    assert all(same_bytes(back[name], tensors[name]) for name in tensors)


def test_numbers_that_are_none_come_back_too(tmp_path: Path) -> None:
    """NaN with its payload, both infinities, minus zero."""
    odd = torch.tensor([0x7FC00001, -0x400000, 0x7F800000, -0x80000000], dtype=torch.int32).view(
        torch.float32
    )
    path = save(tmp_path, 1, 0, {"odd": odd}, {})
    assert same_bytes(dict(read(path).tensors())["odd"], odd)


def test_safetensors_reads_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.tensor(True), "c": torch.arange(5)}
    path = save(tmp_path, 7, 2, tensors, {"seconds": 1.5})
    with safe_open(path, framework="pt") as f:
        assert set(f.keys()) == {"a", "b", "c"}
        assert all(torch.equal(f.get_tensor(name), t) for name, t in tensors.items())
        state = json.loads(f.metadata()["state"])
    assert state == {"seconds": 1.5, "step": 7, "sequences": 2} == read(path).state


def test_every_tensor_begins_at_a_multiple_of_its_element(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(3, dtype=torch.float64),
        "c": torch.ones(1, dtype=torch.bfloat16),
    }
    path = save(tmp_path, 1, 0, tensors, {})
    header = verified_header(path)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert all(header[name]["data_offsets"][0] % t.element_size() == 0 for name, t in tensors.items())


def test_a_tensor_of_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PIECE", 64)
    tensors = {"a": torch.arange(1001.0), "b": torch.arange(17, dtype=torch.int8)}
    back = dict(read(save(tmp_path, 1, 0, tensors, {})).tensors())
    assert all(torch.equal(back[name], t) for name, t in tensors.items())


def test_no_bit_of_the_file_can_change(tmp_path: Path) -> None:
    """Length, checksum, state, offsets, padding, data."""
    path = save(tmp_path, 1, 0, TENSORS, {})
    good = path.read_bytes()
    read(path)
    with path.open("r+b", buffering=0) as f:
        for at in range(len(good)):
            for bit in range(8):
                f.seek(at)
                f.write(bytes([good[at] ^ 1 << bit]))
                with pytest.raises(Damaged):
                    read(path)
                f.seek(at)
                f.write(good[at : at + 1])
    read(path)


def test_a_file_of_any_other_length_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 0, TENSORS, {})
    good = path.read_bytes()
    for n in range(len(good)):
        path.write_bytes(good[:n])
        with pytest.raises(Damaged):
            read(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(Damaged, match="SHA-256"):
        read(path)


def test_others_safetensors_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "000000001-000000.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(Damaged, match="not written by Tightfit"):
        read(path)


@pytest.mark.parametrize("moment", ["begin", "header", "written", "synced"])
@pytest.mark.parametrize("kind", ["full", "crash"])
def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, moment: str, kind: str
) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, TENSORS, {})
    before = path.read_bytes()
    faults.arm(f"checkpoint.{moment}={kind}")
    with pytest.raises((OSError, RuntimeError)):
        write_tensors(path, {"model/w": torch.zeros(9)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_tensor_that_cannot_be_read_ends_the_checksums_thread(tmp_path: Path) -> None:
    class Gone(torch.Tensor):
        def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise RuntimeError("the card is gone")

    threads = _thread._count()
    with pytest.raises(RuntimeError, match="the card is gone"):
        write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2).as_subclass(Gone)}, {})
    for _ in range(500):  # it has nothing left to do, but has yet to go
        if _thread._count() > threads:
            time.sleep(0.01)
    assert _thread._count() == threads and not list(tmp_path.iterdir())


def refused(*args: Any) -> int:
    raise RuntimeError("can't start new thread")


def without_memory(*args: Any) -> int:
    raise MemoryError


def died_before_it_began(*args: Any) -> int:  # python/cpython#140746
    return 0


@pytest.mark.parametrize("waiting", [0, 4])
@pytest.mark.parametrize("start", [refused, without_memory, died_before_it_began])
def test_without_memory_for_a_thread_the_checksum_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Any, waiting: int
) -> None:
    digest = checkpoint._Digest
    monkeypatch.setattr(checkpoint, "PIECE", 3)
    with monkeypatch.context() as without:
        without.setattr(_thread, "start_new_thread", start)
        without.setattr(checkpoint, "_Digest", lambda **_: digest(waiting))
        write_tensors(tmp_path / "a.safetensors", TENSORS, {})
    write_tensors(tmp_path / "b.safetensors", TENSORS, {})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    verified_header(tmp_path / "a.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="Windows syncs no folders")
def test_bytes_are_synced_then_named_then_the_name_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "000000001-000000.safetensors"
    seen: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            seen.append("folder")
        else:
            seen.append(sha256_file(private(path)))
        real_fsync(handle)

    def replace(self: Path, target: Path) -> Path:
        seen.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save(tmp_path, 1, 0, TENSORS, {})
    assert seen[-3:] == [sha256_file(path), "rename", "folder"]
    assert seen.count("rename") == seen.count("folder") == 1


def test_a_read_only_file_is_replaced(tmp_path: Path) -> None:
    """DVC's cache hands out such."""
    path = tmp_path / "model.safetensors"
    write_tensors(path, TENSORS, {})
    path.chmod(0o444)
    write_tensors(path, {"a": torch.ones(1)}, {})
    assert verified_header(path).keys() == {"__metadata__", "a"}


def test_a_header_that_is_too_long_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(text: bytes) -> None:
        raise AssertionError("it was parsed")

    path = tmp_path / "000000001-000000.safetensors"
    monkeypatch.setattr("core.checkpoint.json.loads", parsed)
    for length in (HEADER_MAX + 1, 2**63):
        with path.open("wb") as f:
            f.write(length.to_bytes(8, "little") + checkpoint.PREFIX)
            f.truncate(HEADER_MAX + 64)
        with pytest.raises(Damaged, match=f"a header of {length:,} bytes"):
            read(path)


def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    save(tmp_path, 1, 0, TENSORS, {})
    with pytest.raises(Exception, match="header"):
        save(tmp_path, 2, 0, TENSORS, {"strategies": {"mine": {"seen": "x" * HEADER_MAX}}})
    assert steps(tmp_path) == [1]


# --- the row of a run ---------------------------------------------------------------------------------------


def test_older_ones_go_only_when_the_new_one_is_durable(tmp_path: Path) -> None:
    there: dict[str, list[int]] = {}
    filled(tmp_path, 1, 2)
    for moment in (*faults.WRITING, "durable", "pruned"):
        faults.when(f"checkpoint.{moment}", lambda m=moment: there.update({m: steps(tmp_path)}))
    save(tmp_path, 3, 0, TENSORS, {})
    assert KEEP == 2
    assert there == {
        **{"begin": [2, 1], "header": [2, 1], "written": [2, 1], "synced": [2, 1]},
        **{"renamed": [3, 2, 1], "durable": [3, 2, 1], "pruned": [3, 2]},
    }


def test_what_is_no_checkpoint_is_neither_listed_nor_removed(tmp_path: Path) -> None:
    foreign = [
        *("log.jsonl", "run.json", "lock", "model.safetensors", "3-0.safetensors", "last.safetensors"),
        *(".000000009-000000.safetensors.partial", "000000009-000000.safetensors.bak"),
        *("000000009-000000.refused", "x000000009-000000.safetensors", "0000000009-000000.safetensors"),
    ]
    for name in foreign:
        (tmp_path / name).touch()
    filled(tmp_path, 1, 2, 3, 4)
    assert steps(tmp_path) == [4, 3]
    assert all((tmp_path / name).exists() for name in foreign)


def test_within_a_step_more_sequences_are_further(tmp_path: Path) -> None:
    for sequences in (2, 10, 0):
        save(tmp_path, 5, sequences, TENSORS, {})
    assert [position(p) for p in listing(tmp_path)] == [(5, 10), (5, 2)]


def test_on_a_full_disk_older_ones_give_way_and_it_is_tried_once_more(tmp_path: Path) -> None:
    there: list[list[int]] = []
    filled(tmp_path, 1, 2)
    faults.arm("checkpoint.written=full")
    faults.when("checkpoint.header", lambda: there.append(steps(tmp_path)))
    save(tmp_path, 3, 0, TENSORS, {})
    assert there == [[2, 1], [2]] and steps(tmp_path) == [3, 2]
    assert read(listing(tmp_path)[0]).state["step"] == 3


@pytest.mark.parametrize("kind", ["full", "quota"])
def test_the_newest_older_one_never_gives_way(tmp_path: Path, kind: str) -> None:
    visits: list[int] = []
    filled(tmp_path, 1, 2)
    faults.when("checkpoint.begin", lambda: visits.append(1))
    faults.arm(f"checkpoint.synced={kind}@1-2")
    with pytest.raises(OSError):
        save(tmp_path, 3, 0, TENSORS, {})
    assert steps(tmp_path) == [2] and len(visits) == 2, "one retry"
    faults.arm(f"checkpoint.synced={kind}@1")
    with pytest.raises(OSError):
        save(tmp_path, 3, 0, TENSORS, {})
    assert steps(tmp_path) == [2] and len(visits) == 3, "nothing to give: no retry"
    assert [p.name for p in tmp_path.iterdir()] == ["000000002-000000.safetensors"]


def test_the_newest_older_one_stays_where_the_folder_cannot_be_synced(tmp_path: Path) -> None:
    """The new file has its name, but a power cut may take that back."""
    filled(tmp_path, 1, 2)
    faults.arm("checkpoint.renamed=full@1-2")
    with pytest.raises(OSError):
        save(tmp_path, 3, 0, TENSORS, {})
    assert 2 in steps(tmp_path)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES, errno.EINVAL])
def test_what_more_room_does_not_mend_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    filled(tmp_path, 1, 2)

    def refuse(*args: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(checkpoint, "write_tensors", refuse)
    with pytest.raises(OSError, match="no"):
        save(tmp_path, 3, 0, TENSORS, {})
    assert steps(tmp_path) == [2, 1]


# --- going on -----------------------------------------------------------------------------------------------


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert found(tmp_path) == (None, [])


def test_the_furthest_by_name_whatever_the_clock_says(tmp_path: Path) -> None:
    filled(tmp_path, 10, 9)
    os.utime(tmp_path / "000000010-000000.safetensors", (0, 0))
    os.utime(tmp_path / "000000009-000000.safetensors", (2**31, 2**31))
    best, said = found(tmp_path)
    assert best.state["step"] == 10 and not said


def test_one_that_cannot_be_used_is_told_and_set_aside(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2)
    bad = listing(tmp_path)[0]
    bad.write_bytes(bad.read_bytes()[:-1])
    best, said = found(tmp_path)
    assert best.state["step"] == 1
    assert said == [
        "warning: 000000002-000000.safetensors cannot be used: its bytes are not those that were written "
        "(SHA-256). Going back to 000000001-000000.safetensors"
    ]
    assert bad.with_suffix(".refused").exists() and steps(tmp_path) == [1]
    filled(tmp_path, 2)
    assert steps(tmp_path) == [2, 1], "what was refused does not count among those to keep"


def test_one_of_another_run_is_told_by_what_differs(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2)
    best, said = found(tmp_path, lambda state: ["train.lr is 1, not 2"] if state["step"] == 2 else [])
    assert best.state["step"] == 1
    assert "it belongs to another run: train.lr is 1, not 2" in said[0]


def test_none_that_can_be_used_is_an_error_and_nothing_moves(tmp_path: Path) -> None:
    """Never afresh by itself, and a good copy can still be put back under its name."""
    filled(tmp_path, 1, 2)
    for path in listing(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="--fresh") as e:
        found(tmp_path)
    assert str(tmp_path) in str(e.value) and str(e.value).count("a header of 0 bytes in a file of 0") == 2
    assert steps(tmp_path) == [2, 1]


def test_one_that_could_only_not_be_read_stays_where_it_is(tmp_path: Path) -> None:
    """Its permissions can be mended, and then it counts again."""
    filled(tmp_path, 1)
    (tmp_path / "000000002-000000.safetensors").mkdir()
    best, said = found(tmp_path)
    assert best.state["step"] == 1 and "000000002" in said[0]
    assert steps(tmp_path) == [2, 1]


def test_what_was_set_aside_is_not_forgotten_when_nothing_else_is_left(tmp_path: Path) -> None:
    (path,) = listing(filled(tmp_path, 3))
    path.replace(path.with_suffix(".refused"))
    with pytest.raises(UserError, match=r"000000003-000000\.refused"):
        found(tmp_path)


@pytest.mark.parametrize("name", ["000000005-000000", "000000003-000002"])
def test_a_swapped_name_is_refused(tmp_path: Path, name: str) -> None:
    (path,) = listing(filled(tmp_path, 3))
    path = path.replace(path.with_name(f"{name}.safetensors"))
    with pytest.raises(Damaged, match="it is that of step 3, under another's name"):
        read(path)


@pytest.mark.parametrize("number", ["0", "2", "", "1.0"])
def test_another_format_is_refused_with_its_number(tmp_path: Path, number: str) -> None:
    path = tmp_path / "000000003-000000.safetensors"
    state = json.dumps({"step": 3, "sequences": 0})
    write_tensors(path, TENSORS, {"format": number, "state": state})
    with pytest.raises(Damaged, match=f"format {number!r}, this version reads 1"):
        read(path)
    write_tensors(path, TENSORS, {"format": "1", "state": state})
    assert read(path).state["step"] == 3


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "1"},
        {"format": "1", "state": "{"},
        {"format": "1", "state": "[]"},
        {"format": "1", "state": "3"},
        {"format": "1", "state": "{}"},
        {"format": "1", "state": "[" * 100_000},
    ],
    ids=lambda metadata: str(metadata)[:40],
)
def test_a_sound_file_that_is_no_checkpoint(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "000000003-000000.safetensors"
    write_tensors(path, TENSORS, metadata)
    with pytest.raises(Damaged):
        read(path)


# --- room ---------------------------------------------------------------------------------------------------


def test_the_size_said_beforehand_is_about_right(tmp_path: Path) -> None:
    tensors = {f"layer {i}": torch.ones(300, 300) for i in range(20)}
    there = save(tmp_path, 1, 0, tensors, {}).stat().st_size
    assert there <= size(tensors) <= there + (2 << 20)


def test_a_disk_that_is_too_small_is_named_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    free = 30_000
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 0, free))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model").write_bytes(b"." * 5_000)  # will be replaced: it counts as room
    require_room(tmp_path, checkpoint=10_000, models=5_000)
    with pytest.raises(MediaError) as e:
        require_room(tmp_path, checkpoint=10_000, models=5_001)
    assert "need 35,001 bytes, 35,000 are free" in str(e.value) and str(tmp_path) in str(e.value)


# --- a checkpoint of an earlier day -------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return Path(shutil.copy(FIXTURE, tmp_path))


def test_the_stored_checkpoint_is_read(stored: Path) -> None:
    assert stored.stat().st_size < 100_000
    kept = read(stored)
    assert (kept.state["step"], kept.state["sequences"], kept.state["micro_batches"]) == (2, 2, 1)
    kinds = {name.partition("/")[0] for name in kept.shapes}
    assert kinds == {"model", "optimizer", "gradient", "random", "window"}
    assert kept.state["identity"]["train"]["batch_tokens"] == 128
    assert kept.state["journal"]["evaluated"] == 0 and kept.state["numbers"]["skipped"] == 0


def test_a_training_of_today_goes_on_from_the_stored_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were its code and its text those of then."""
    from core.launch import run_training

    monkeypatch.setattr("core.keeper.differences", lambda theirs, ours: [])
    with Lab.open(tmp_path, REPO / "plugins") as lab:
        project = small(lab)
        with pytest.raises(RuntimeError, match="a bug"):
            faults.arm("train.window=crash")
            run_training(project, lambda line: None)
        faults.disarm()
        (folder,) = project.runs.iterdir()
        for path in listing(folder):
            path.unlink()
        shutil.copy(FIXTURE, folder)
        said: list[str] = []
        run_training(project, said.append)
    assert any("going on after step 2 and 1 micro-batches" in line for line in said)
    assert any(line.startswith("step 12: held-out loss") for line in said)


def test_the_stored_checkpoint_goes_into_a_network_of_today(stored: Path) -> None:
    from core.model import build_model
    from core.model_config import ModelConfig
    from core.optim import adamw
    from core.snapshot import RandomState, restore

    kept = read(stored)
    config = ModelConfig(**kept.state["identity"]["recipe"]["model"])
    network = build_model(config, seed=1)
    build: Any = SimpleNamespace(
        network=network,
        model=network,
        accelerator=SimpleNamespace(scaler=None),
        lr=0.5,
        betas=(0.1, 0.2),
        weight_decay=0.3,
    )
    build.optimizer = adamw(build)
    rest = restore(build, kept)
    tensors = {name: t.clone() for name, t in kept.tensors()}
    for name, p in network.named_parameters():
        state = build.optimizer.state[p]
        assert torch.equal(p, tensors[f"model/{name}"])
        assert torch.equal(p.grad, tensors[f"gradient/{name}"])
        assert torch.equal(state["exp_avg_sq"], tensors[f"optimizer/exp_avg_sq/{name}"])
        assert state["step"] == 2
    assert build.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert RandomState.of(rest, "random/0") and RandomState.of(rest, "window/random")
    assert rest["window/loss"].isfinite()


def test_the_stored_checkpoint_does_not_forgive_a_bit(stored: Path) -> None:
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    with pytest.raises(Damaged, match="SHA-256"):
        read(stored)
