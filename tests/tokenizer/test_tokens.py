"""Token shards: what is written is what the tokenizer says, whatever the threads, or nothing is written."""

import hashlib
import json
import pickle
import tracemalloc

import numpy as np
import pytest
from helpers import make_project, sample_text

import core.tokens
from core import faults
from core.errors import UserError
from core.tokenizer import Tokenizer
from core.tokens import TokenShards, spread, tokenize


def quiet(line):
    pass


def write_documents(project, train, val):
    """Stand in for prepare-data."""
    project.documents.mkdir(parents=True, exist_ok=True)
    manifest = {"source": "test"}
    for split, texts in (("train", train), ("val", val)):
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        content = "".join(lines).encode()
        (project.documents / f"{split}.jsonl").write_bytes(content)
        size, sha256 = sum(len(text.encode()) for text in texts), hashlib.sha256(content).hexdigest()
        manifest[split] = {"documents": len(texts), "bytes": size, "sha256": sha256}
    (project.documents / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


TRAIN = [*sample_text(60_000, seed=1).split("\n\n"), "", "<|bos|> as text", "a\r\nb\x00ə 😀"]
VAL = sample_text(5_000, seed=2).split("\n\n")


@pytest.fixture
def project(tmp_path):
    project = make_project(tmp_path, tokenizer={"vocab_size": 400})
    write_documents(project, TRAIN, VAL)
    return project


def expected_ids(tokenizer, texts):
    return np.concatenate([part for text in texts for part in ([tokenizer.bos], tokenizer.encode(text))])


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def damage(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


# --- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "byte", "gpt2"])
def test_shards_hold_the_encoded_documents(tmp_path, kind):
    project = make_project(tmp_path, tokenizer={"kind": kind, "vocab_size": 400 if kind == "bpe" else None})
    write_documents(project, TRAIN, VAL)
    manifest = tokenize(project, quiet)
    tokenizer = Tokenizer.load(project.tokens / "tokenizer")
    assert manifest["tokenizer_sha256"] == tokenizer.sha256
    assert (manifest["n_vocab"], manifest["bos"]) == (tokenizer.n_vocab, tokenizer.bos)
    assert json.loads((project.tokens / "manifest.json").read_text(encoding="utf-8")) == manifest
    for split, texts in (("train", TRAIN), ("val", VAL)):
        shards = TokenShards.open(project.tokens, split, verify=True)
        ids = np.concatenate(shards.shards)
        assert np.array_equal(ids, expected_ids(tokenizer, texts))
        assert shards.dtype == np.dtype("<u2")
        assert shards.n_tokens == len(ids) == manifest[split]["tokens"]
        assert shards.n_bytes == sum(len(t.encode()) for t in texts) == tokenizer.token_bytes()[ids].sum()
        assert manifest[split]["documents"] == len(texts)
        assert manifest["bytes_per_token"][split] == pytest.approx(shards.n_bytes / shards.n_tokens, abs=1e-4)


def test_several_shards_and_batches(project, monkeypatch):
    tokenize(project, quiet)
    whole = TokenShards.open(project.tokens, "train").shards[0].copy()
    monkeypatch.setattr(core.tokens, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(core.tokens, "BATCH", 700)
    tokenize(project, quiet)
    shards = TokenShards.open(project.tokens, "train", verify=True)
    sizes = [len(shard) for shard in shards.shards]
    assert len(sizes) > 10 and set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    assert np.array_equal(np.concatenate(shards.shards), whole)
    assert sorted(p.name for p in project.tokens.glob("train_*"))[1] == "train_001.bin"


def test_a_full_last_shard_leaves_no_empty_one(tmp_path, monkeypatch):
    project = make_project(tmp_path, tokenizer={"kind": "byte", "vocab_size": None})
    write_documents(project, ["x" * 99] * 10, ["y" * 99])
    monkeypatch.setattr(core.tokens, "SHARD_TOKENS", 500)
    assert [s["tokens"] for s in tokenize(project, quiet)["train"]["shards"]] == [500, 500]
    assert [s["tokens"] for s in tokenize(project, quiet)["val"]["shards"]] == [100]


def test_equal_bytes_whatever_the_threads(project, monkeypatch):
    monkeypatch.setattr(core.tokens, "BATCH", 500)
    tokenize(project, quiet, threads=1)
    first = content(project.tokens)
    for threads in (2, 5):
        tokenize(project, quiet, threads=threads)
        assert content(project.tokens) == first


def test_uint32_for_large_vocabularies(project, monkeypatch):
    large = {bytes([i]): i for i in range(256)}
    for i in range(256, 70_000):
        large[b"\xff" + i.to_bytes(3, "big")] = i
    large[b"the"] = 70_000
    tokenizer = Tokenizer("bpe", Tokenizer.byte().pattern, large)
    monkeypatch.setattr(core.tokens, "_make_tokenizer", lambda *args: tokenizer)
    manifest = tokenize(project, quiet)
    shards = TokenShards.open(project.tokens, "train", verify=True)
    assert manifest["dtype"] == "uint32" and shards.dtype == np.dtype("<u4")
    ids = np.concatenate(shards.shards)
    assert np.array_equal(ids, expected_ids(tokenizer, TRAIN))
    assert ids.max() == tokenizer.bos == 70_001


def test_uint16_reaches_to_65536_ids(project, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)} | {
        b"\xff" + i.to_bytes(3, "big"): i for i in range(256, 65_535)
    }
    tokenizer = Tokenizer("bpe", Tokenizer.byte().pattern, ranks)
    monkeypatch.setattr(core.tokens, "_make_tokenizer", lambda *args: tokenizer)
    assert tokenize(project, quiet)["dtype"] == "uint16"
    assert TokenShards.open(project.tokens, "val").shards[0][0] == tokenizer.bos == 65_535


def test_vocabulary_is_learned_from_train_only(project):
    tokenize(project, quiet)
    first = content(project.tokens / "tokenizer")
    write_documents(project, TRAIN, ["entirely different words " * 50])
    tokenize(project, quiet)
    assert content(project.tokens / "tokenizer") == first


def test_says_what_it_does(project, monkeypatch):
    monkeypatch.setattr(core.tokens, "PROGRESS_SECONDS", -1)
    lines = []
    tokenize(project, lines.append)
    text = "\n".join(lines)
    for part in ("learned 400 ids in", "train: ", "val: ", "bytes per token", "MB/s"):
        assert part in text


def test_a_corpus_with_few_pairs_says_so(tmp_path):
    project = make_project(tmp_path, tokenizer={"vocab_size": 4000})
    write_documents(project, ["abab"] * 9, ["ab"])
    lines = []
    assert tokenize(project, lines.append)["n_vocab"] < 300
    assert any("no more pairs" in line for line in lines)


# --- errors -----------------------------------------------------------------------------------------------------


def test_too_short_a_split_is_refused_and_the_old_output_stays(project):
    tokenize(project, quiet)
    before = content(project.tokens)
    write_documents(project, TRAIN, ["short"])
    with pytest.raises(UserError, match=r"val: .*val_fraction.*block_size"):
        tokenize(project, quiet, min_tokens=1025)
    assert content(project.tokens) == before
    write_documents(project, [], [])
    with pytest.raises(UserError, match=r"(?s)train: 0 tokens.*val: 0 tokens"):
        tokenize(project, quiet)
    assert content(project.tokens) == before


def test_min_tokens_is_exact(tmp_path):
    project = make_project(tmp_path, tokenizer={"kind": "byte", "vocab_size": None})
    write_documents(project, ["x" * 64], ["y" * 32])
    assert tokenize(project, quiet, min_tokens=33)["val"]["tokens"] == 33
    with pytest.raises(UserError):
        tokenize(project, quiet, min_tokens=34)


def test_failing_half_way_leaves_the_old_output(project, monkeypatch):
    tokenize(project, quiet)
    before = content(project.tokens)
    encode, calls = Tokenizer.encode, []

    def failing(self, text):
        calls.append(text)
        if len(calls) > 40:
            raise OSError(28, "No space left on device")
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", failing)
    monkeypatch.setattr(core.tokens, "BATCH", 500)
    with pytest.raises(OSError, match="No space"):
        tokenize(project, quiet)
    assert content(project.tokens) == before
    assert [p.name for p in project.tokens.parent.iterdir() if "partial" in p.name] == []


def test_missing_documents(tmp_path):
    project = make_project(tmp_path)
    with pytest.raises(UserError, match="prepare-data"):
        tokenize(project, quiet)


def test_documents_that_lost_lines(project):
    path = project.documents / "train.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))
    with pytest.raises(UserError, match="prepare-data"):
        tokenize(project, quiet)
    assert not project.tokens.exists()


@pytest.mark.parametrize("manifest", [[], {}, {"train": {}}, {"train": {"bytes": "many", "documents": 1}}])
def test_a_manifest_of_documents_that_is_none(project, manifest):
    (project.documents / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match="prepare-data"):
        tokenize(project, quiet)


# --- the sample that bpe learns from ----------------------------------------------------------------------------


def size(texts):
    return sum(len(text.encode()) for text in texts)


def test_spread_takes_everything_that_fits():
    texts = ["one", "", "zwei ə", "x" * 200_000]
    for budget in (size(texts), 10**9):
        assert "".join(spread(texts, size(texts), budget)) == "".join(texts)


def test_spread_is_even():
    texts = [f"{i:04d}" for i in range(10_000)]
    taken = list(spread(texts, size(texts), 4_000))
    assert size(taken) == 4_000
    assert [sum(int(t) // 1000 == k for t in taken) for k in range(10)] == [100] * 10


@pytest.mark.parametrize("budget", [1, 7, 1000, 100_000, 1_000_000])
def test_spread_cuts_long_documents(budget):
    texts = ["ə" * 700_000, "b" * 300_000]
    taken = list(spread(texts, size(texts), budget))
    assert budget - 1 <= size(taken) <= budget or budget == 1
    assert "".join(taken).strip("əb") == ""
    if budget >= 500_000:
        assert any("ə" in t for t in taken) and any("b" in t for t in taken)


def test_train_bytes_limits_what_is_learned(tmp_path):
    project = make_project(tmp_path, tokenizer={"vocab_size": 4000, "train_bytes": 300})
    write_documents(project, TRAIN, VAL)
    lines = []
    manifest = tokenize(project, lines.append)
    assert manifest["n_vocab"] < 257 + 300
    assert manifest["train"]["documents"] == len(TRAIN), "all of it is encoded"


# --- reading ----------------------------------------------------------------------------------------------------


def test_shards_are_read_only_maps(project):
    tokenize(project, quiet)
    shards = TokenShards.open(project.tokens, "train")
    assert all(isinstance(shard, np.memmap) for shard in shards.shards)
    with pytest.raises(ValueError, match="read-only"):
        shards.shards[0][0] = 1
    assert shards.shards is shards.shards, "mapped once"


def test_pickling_leaves_the_maps_behind(project):
    tokenize(project, quiet)
    shards = TokenShards.open(project.tokens, "train")
    ids = shards.shards[0]
    data = pickle.dumps(shards)
    assert len(data) < 5_000 < ids.nbytes
    again = pickle.loads(data)
    assert np.array_equal(again.shards[0], ids)
    assert (again.n_tokens, again.n_bytes, again.dtype) == (shards.n_tokens, shards.n_bytes, shards.dtype)


def test_verify_catches_a_flipped_bit(project):
    tokenize(project, quiet)
    damage(project.tokens / "val_000.bin", lambda data: data.__setitem__(100, data[100] ^ 1))
    TokenShards.open(project.tokens, "val")
    with pytest.raises(UserError, match=r"(?s)val_000.bin: its sha256.*run `tokenize` again"):
        TokenShards.open(project.tokens, "val", verify=True)
    TokenShards.open(project.tokens, "train", verify=True)


def test_verify_catches_another_tokenizer(project):
    tokenize(project, quiet)
    Tokenizer.byte().save(project.tokens / "tokenizer")
    TokenShards.open(project.tokens, "train")
    with pytest.raises(UserError, match="tokenizer"):
        TokenShards.open(project.tokens, "train", verify=True)


def test_truncated_and_missing_shards_are_all_named(project, monkeypatch):
    monkeypatch.setattr(core.tokens, "SHARD_TOKENS", 2000)
    tokenize(project, quiet)
    damage(project.tokens / "train_001.bin", lambda data: data.pop())
    (project.tokens / "train_003.bin").unlink()
    with pytest.raises(
        UserError, match=r"(?s)train_001.bin has 3,999 bytes.*train_003.bin is missing.*`tokenize`"
    ):
        TokenShards.open(project.tokens, "train")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="`tokenize`"):
        TokenShards.open(tmp_path / "tokens", "train")


CHANGES = {
    "another format": lambda m: m.update(format=2),
    "a format that is none": lambda m: m.update(format=["x" * 10_000]),
    "no format": lambda m: m.pop("format"),
    "no split": lambda m: m.pop("val"),
    "a split that is none": lambda m: m.update(val=[]),
    "another dtype": lambda m: m.update(dtype="float32"),
    "a dtype that is none": lambda m: m.update(dtype={}),
    "shards that are none": lambda m: m["val"].update(shards=3),
    "shards as a mapping": lambda m: m["val"].update(shards={"train_000.bin": 1}),
    "a shard that is none": lambda m: m["val"].update(shards=["val_000.bin"]),
    "no tokens": lambda m: m["val"]["shards"][0].pop("tokens"),
    "tokens in words": lambda m: m["val"]["shards"][0].update(tokens="x"),
    "tokens as a float": lambda m: m["val"]["shards"][0].update(tokens=1e3),
    "true tokens": lambda m: m["val"].update(tokens=True),
    "negative tokens": lambda m: m["val"]["shards"][0].update(tokens=-4),
    "an empty shard": lambda m: m["val"]["shards"].append({"file": "val_001.bin", "tokens": 0, "sha256": "0" * 64}),
    "too many tokens": lambda m: m["val"]["shards"][0].update(tokens=10**30),
    "another sum": lambda m: m["val"].update(tokens=7),
    "no bytes": lambda m: m["val"].pop("bytes"),
    "negative bytes": lambda m: m["train"].update(bytes=-1),
    "no hash": lambda m: m["val"]["shards"][0].update(sha256=None),
    "no ids": lambda m: m.update(n_vocab=0),
    "ids that uint16 cannot hold": lambda m: m.update(n_vocab=100_000),
    "bos that is no id": lambda m: m.update(bos=400),
    "a tokenizer without hash": lambda m: m.update(tokenizer_sha256=5),
    "nan": lambda m: m.update(n_vocab=float("nan")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_manifest(project, name):
    manifest = tokenize(project, quiet)
    CHANGES[name](manifest)
    (project.tokens / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)is damaged.*manifest.json.*`tokenize`") as e:
        TokenShards.open(project.tokens, "val")
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../../corpus.txt",
            "../tokens/val_000.bin",
            "./val_000.bin",
            "tokenizer/tokenizer.json",
            "train_000.bin",
        ),
        *("val_000.bin\0", "VAL_000.BIN", "val_001.bin", "C:val_000.bin", "..\\val_000.bin", "", ".", "nul"),
        *("/etc/hostname", "//server/share/x", 5, None, ["val_000.bin"]),
    ],
    ids=repr,
)
def test_a_manifest_names_nothing_but_its_own_files(project, name, monkeypatch):
    manifest = tokenize(project, quiet)
    manifest["val"]["shards"][0]["file"] = name
    (project.tokens / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    opened = []
    real = type(project.tokens).open
    monkeypatch.setattr(
        type(project.tokens), "open", lambda path, *a, **k: opened.append(path.name) or real(path, *a, **k)
    )
    with pytest.raises(UserError, match=r"manifest\.json: val: .* where val_000\.bin belongs"):
        TokenShards.open(project.tokens, "val", verify=True)
    assert set(opened) <= {"manifest.json"}


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, 100 << 20, b"", b"null", b"\xff"])
def test_a_manifest_that_is_none(project, content):
    tokenize(project, quiet)
    with (project.tokens / "manifest.json").open("wb") as f:
        f.truncate(content) if isinstance(content, int) else f.write(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        TokenShards.open(project.tokens, "val")


def test_a_million_shards(project):
    manifest = tokenize(project, quiet)
    manifest["val"]["shards"] *= 1_000_000
    (project.tokens / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json has more than 4 MiB"):
        TokenShards.open(project.tokens, "val")


def test_verify_catches_ids_beyond_the_vocabulary(project):
    """Whatever the hash says: one that was made for the damaged file too."""
    manifest = tokenize(project, quiet)
    path = project.tokens / "val_000.bin"
    damage(path, lambda data: data.__setitem__(slice(200, 202), (400).to_bytes(2, "little")))
    manifest["val"]["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (project.tokens / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=r"val_000.bin holds the id 400, but there are 400 ids"):
        TokenShards.open(project.tokens, "val", verify=True)


def test_verify_catches_a_manifest_of_another_vocabulary(project):
    manifest = tokenize(project, quiet)
    manifest["n_vocab"] += 64
    (project.tokens / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match="n_vocab and bos are not the tokenizer's"):
        TokenShards.open(project.tokens, "train", verify=True)


def test_verifying_takes_little_memory(project, monkeypatch):
    monkeypatch.setattr(core.tokens, "SHARD_TOKENS", 1 << 23)
    tokenizer = Tokenizer.byte()
    monkeypatch.setattr(core.tokens, "_make_tokenizer", lambda *args: tokenizer)
    write_documents(project, ["x" * 5_000_000] * 4, VAL)
    tokenize(project, quiet)
    tracemalloc.start()
    try:
        TokenShards.open(project.tokens, "train", verify=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


def test_damaged_documents_are_refused_and_the_old_tokens_stay(project):
    """A letter for another: every line is JSON and their number is right."""
    tokenize(project, quiet)
    before = content(project.tokens)
    path = project.documents / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"laughed", b"laughtd", 1))
    with pytest.raises(UserError, match=r"(?s)train\.jsonl is damaged.*sha256.*dvc repro -f -s prepare-data"):
        tokenize(project, quiet)
    assert content(project.tokens) == before


def test_every_batch_passes_a_point(project, monkeypatch):
    monkeypatch.setattr(core.tokens, "BATCH", 5000)
    visits = []
    faults.when("tokenize.batch", lambda: visits.append(1))
    try:
        tokenize(project, quiet)
    finally:
        faults.disarm()
    assert len(visits) > 10
