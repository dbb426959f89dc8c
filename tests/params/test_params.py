"""params.yaml: what is accepted, and that every refusal names the key, the value and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

import core
from core.errors import UserError
from core.params import Params, load_params

REPO = Path(core.__file__).parents[1]
BUDGET = "train: {max_steps: 1}\n"


def load(tmp_path: Path, content: str | bytes) -> Params:
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_params(path)


def refusal(tmp_path: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- what is accepted


def test_shipped_file_loads_and_names_no_unknown_key() -> None:
    params = load_params(REPO / "params.yaml")
    raw = YAML(typ="safe", pure=True).load((REPO / "params.yaml").read_text(encoding="utf-8"))

    def walk(keys: dict[str, Any], section: BaseModel) -> int:
        seen = 0
        for key, value in keys.items():
            assert key in type(section).model_fields, key
            inner = getattr(section, key)
            seen += 1 + (walk(value, inner) if isinstance(inner, BaseModel) else 0)
        return seen

    assert walk(raw, params) > 20


def test_shipped_comments_name_real_choices(tmp_path: Path) -> None:
    """Each `a | b | c` comment lists values that load, so that a reader can pick any of them."""
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    tried = 0
    for line in text.splitlines():
        key, _, comment = line.partition("#")
        values = [word.strip() for word in comment.split("|")]
        if ":" not in key or len(values) < 2 or key.split(":")[0].strip() == "source":
            continue
        for value in values:
            changed = text.replace(line, f"{key.split(':')[0]}: {value}")
            if value in ("gpt2", "byte") and key.strip().startswith("kind"):
                changed = changed.replace("  vocab_size: 8192\n", "")
            load(tmp_path, changed)
            tried += 1
    assert tried >= 15


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1E-3", 1e-3), ("2e-3", 2e-3), ("1", 1.0)])
def test_exponents_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, f"train: {{max_steps: 1, lr: {text}}}").train.lr == value


def test_underscores_make_integers(tmp_path: Path) -> None:
    tokens = load(tmp_path, "train: {max_tokens: 3_000_000}").train.max_tokens
    assert tokens == 3_000_000 and isinstance(tokens, int)


def test_byte_order_mark_and_crlf_do_not_matter(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + b"seed: 7\r\n" + BUDGET.encode()).seed == 7


def test_loaded_params_are_frozen(tmp_path: Path) -> None:
    params = load(tmp_path, BUDGET)
    for target, key in ((params, "seed"), (params.train, "lr"), (params.data.filters, "lowercase")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, key, 1)


@pytest.mark.parametrize(
    ("section", "n_vocab"),
    [
        ("", 8192),
        ("tokenizer: {kind: bpe, vocab_size: 300}", 300),
        ("tokenizer: {kind: gpt2}", 50257),
        ("tokenizer: {kind: gpt2, vocab_size: 50257}", 50257),
        ("tokenizer: {kind: byte}", 257),
    ],
)
def test_vocabulary_follows_from_the_kind(tmp_path: Path, section: str, n_vocab: int) -> None:
    assert load(tmp_path, BUDGET + section).tokenizer.n_vocab == n_vocab


def test_hub_and_file_sources_with_their_keys(tmp_path: Path) -> None:
    hub = load(tmp_path, BUDGET + "data: {source: hub, dataset: wikimedia/wikipedia, config: 20231101.az}")
    assert hub.data.config == "20231101.az"
    own = load(tmp_path, BUDGET + "data: {source: text, path: in, separator: '<|endoftext|>'}")
    assert own.data.separator == "<|endoftext|>"


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # unknown and misspelt keys, at every depth
        ("hardwere: {}", ["hardwere: unknown key", "Did you mean 'hardware'"]),
        ("data: {min_char: 3}", ["data.min_char: unknown key", "Known here: source"]),
        (
            "data: {filters: {dedupliacte: true}}",
            ["data.filters.dedupliacte", "Did you mean 'deduplicate'", "Known here: fix_mojibake"],
        ),
        ("hardware: {strategies: {ad: [bf16]}}", ["hardware.strategies.ad: unknown key", "'add'"]),
        ("model: {}\nmodell: {}", ["modell: unknown key", "Did you mean 'model'"]),
        # types
        ("seed: one", ["seed: 'one'", "integer"]),
        ("seed: 1.5", ["seed: 1.5", "integer"]),
        ("seed: true", ["seed: True", "integer"]),
        ("seed: '1'", ["seed: '1'", "integer"]),
        ("model: {tie_embeddings: 1}", ["model.tie_embeddings: 1", "boolean"]),
        ("data: {filters: {deduplicate: yes}}", ["data.filters.deduplicate: 'yes'", "boolean"]),
        ("evaluate: {prompts: hello}", ["evaluate.prompts: 'hello'", "list"]),
        ("evaluate: {prompts: [1]}", ["evaluate.prompts.0: 1", "string"]),
        ("hardware: {strategies: {add: bf16}}", ["hardware.strategies.add: 'bf16'", "list"]),
        ("hardware: {options: {loader: 3}}", ["hardware.options.loader: 3", "should hold keys"]),
        # choices
        ("data: {source: txt}", ["data.source: 'txt'", "'sotu', 'text', 'parquet', 'jsonl' or 'hub'"]),
        ("model: {architecture: llama}", ["model.architecture: 'llama'", "'qwen3' or 'gpt2'"]),
        ("data: {filters: {lowercase: yes}}", ["'none', 'default' or 'turkic'"]),
        # ranges
        ("seed: -1", ["seed: -1", "greater than or equal to 0"]),
        ("seed: 4294967296", ["seed: 4294967296", "less than 4294967296"]),
        ("data: {val_fraction: 0}", ["data.val_fraction: 0", "greater than 0"]),
        ("data: {val_fraction: 0.5}", ["data.val_fraction: 0.5", "less than 0.5"]),
        ("data: {max_rows: 0}", ["data.max_rows: 0", "greater than 0"]),
        ("tokenizer: {vocab_size: 256}", ["tokenizer.vocab_size: 256", "greater than or equal to 257"]),
        ("model: {dropout: 1.0}", ["model.dropout: 1.0", "less than 1"]),
        ("model: {dropout: .nan}", ["model.dropout: nan"]),
        ("model: {block_size: 4}", ["model.block_size: 4", "greater than or equal to 8"]),
        ("evaluate: {temperature: 1e-40}", ["evaluate.temperature: 1e-40 should be 0, or 1e-06 or more"]),
        ("evaluate: {top_p: 0}", ["evaluate.top_p: 0", "greater than or equal to 0.000001"]),
        ("hardware: {num_processes: 0}", ["hardware.num_processes: 0", "greater than 0"]),
        # keys that need each other
        ("data: {source: text}", ["data.path is needed for data.source: text"]),
        ("data: {source: parquet}", ["data.path is needed for data.source: parquet"]),
        ("data: {source: hub}", ["data.dataset is needed for data.source: hub"]),
        ("data: {path: in}", ["data.path: 'in' has no effect with data.source: sotu", "null"]),
        (
            "data: {source: text, path: a, dataset: b}",
            ["data.dataset: 'b' has no effect with data.source: text"],
        ),
        (
            "data: {source: jsonl, path: a, separator: x}",
            ["data.separator: 'x' has no effect with data.source: jsonl", "null"],
        ),
        (
            "data: {source: text, path: a, revision: abc, text_column: b}",
            [
                "data.revision: 'abc' has no effect",
                "set it to null",
                "data.text_column: 'b'",
                'set it to "text"',
            ],
        ),
        ("data: {source: hub, dataset: a, errors: replace}", ["data.errors: 'replace' has no effect"]),
        ("data: {source: parquet, path: a, documents: lines}", ["data.documents: 'lines' has no effect"]),
        ("tokenizer: {kind: byte, train_bytes: 5}", ["tokenizer.train_bytes: 5", "tokenizer.kind: byte"]),
        ("model: {architecture: gpt2, rope_theta: 5.0}", ["model.rope_theta: 5.0 has no effect", "gpt2"]),
        (
            "model: {architecture: gpt2, normalize_embeddings: false}",
            ["normalize_embeddings: False", "to true"],
        ),
        ("tokenizer: {kind: gpt2, vocab_size: 8192}", ["tokenizer.vocab_size", "50257", "not 8192", "null"]),
        ("tokenizer: {kind: byte, vocab_size: 8192}", ["tokenizer.vocab_size", "257", "null"]),
    ],
)
def test_bad_value_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(tmp_path, BUDGET + text)
    assert message.startswith("params.yaml has problems:") and message.count("\n  - ") == 1
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{}", ["exactly one of max_steps, max_tokens, max_minutes", "set: none"]),
        ("{max_steps: 1, max_minutes: 2}", ["exactly one", "set: max_steps, max_minutes"]),
        ("{max_steps: 0}", ["train.max_steps: 0", "greater than 0"]),
        ("{max_tokens: 1e6}", ["train.max_tokens: 1000000.0", "integer"]),
        ("{max_steps: 1, lr: 0}", ["train.lr: 0", "greater than 0"]),
        ("{max_steps: 1, lr: .inf}", ["train.lr: inf", "finite"]),
        ("{max_steps: 1, lr: 1e-3x}", ["train.lr: '1e-3x'", "number"]),
        ("{max_steps: 1, cooldown: 1.5}", ["train.cooldown: 1.5", "less than or equal to 1"]),
        ("{max_steps: 1, beta2: 1}", ["train.beta2: 1", "less than 1"]),
        ("{max_steps: 1, micro_batch: 0}", ["train.micro_batch: 0", "greater than 0", "or 'auto'"]),
        ("{max_steps: 1, micro_batch: big}", ["train.micro_batch: 'big'", "integer", "or 'auto'"]),
    ],
)
def test_bad_train_section(tmp_path: Path, section: str, words: list[str]) -> None:
    message = refusal(tmp_path, f"train: {section}")
    assert message.count("\n  - ") == 1, message
    for word in words:
        assert word in message, message


def test_every_problem_at_once(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        "sede: 1\nseed: x\ndata: {source: hub}\nmodel: {n_layer: 0, n_heads: 4}\ntrain: {}\nevaluate: {top_k: -1}",
    )
    keys = (
        "sede: ",
        "seed: ",
        "data.dataset",
        "model.n_layer: 0",
        "model.n_heads",
        "train: set",
        "evaluate.top_k",
    )
    for key in keys:
        assert f"  - {key}" in message, message
    assert message.count("\n  - ") == len(keys)


def test_missing_train_section(tmp_path: Path) -> None:
    assert "train: missing" in refusal(tmp_path, "seed: 1\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", ["line 2", "duplicate key", "seed"]),
        ("train: {max_steps: 1, max_steps: 2}", ["line 1", "duplicate key", "max_steps"]),
        ("train:\n\tmax_steps: 1\n", ["line 2, column 1", "\\t"]),
        ("train: {max_steps: 1", ["line 1", "expected ',' or '}'"]),
        ("train: {max_steps: 1}\n---\nseed: 1\n", ["another document"]),
        ("seed: *nothing\n", ["line 1", "nothing"]),
        ("seed: !odd 1\n", ["line 1", "tag", "!odd"]),
        ("seed: \x01\n", ["#x0001"]),
    ],
)
def test_bad_yaml_is_placed(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith("params.yaml") and "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_tags_execute_nothing(tmp_path: Path, tag: str) -> None:
    made = tmp_path / "made"
    message = refusal(tmp_path, f'{BUDGET}seed: {tag} ["{made.as_posix()}"]\n')
    assert "line 2" in message and "tag" in message
    assert not made.exists()


@pytest.mark.parametrize("text", ["- 1\n", "just words\n", "3\n"])
def test_not_a_mapping(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text).startswith("params.yaml: expected `key: value` sections")


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith("params.yaml") and "key: value" in message


def test_empty_file_is_called_empty(tmp_path: Path) -> None:
    message = refusal(tmp_path, "")
    assert "empty" in message and "NoneType" not in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("hardware:\n", "hardware"),  # every line of a section commented out
        ("data: {filters: }\n", "data.filters"),
        ("hardware: {strategies: [bf16]}\n", "hardware.strategies"),
        ("1: 2\n", "1"),
    ],
)
def test_section_of_the_wrong_shape_in_plain_words(tmp_path: Path, text: str, key: str) -> None:
    message = refusal(tmp_path, BUDGET + text)
    assert f"  - {key}: " in message
    for jargon in ("instance of", "Params", "StrategyChoice", "should be Keys"):
        assert jargon not in message, message


def test_missing_file_and_foreign_encoding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml is missing"):
        load_params(tmp_path / "params.yaml")
    assert "not UTF-8 at byte 7" in refusal(tmp_path, b"# caf\xc3\xa9\xe9\n")
    assert "not UTF-8 at byte 0" in refusal(tmp_path, "seed: 1\n".encode("utf-16"))
