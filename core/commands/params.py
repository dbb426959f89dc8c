"""`tightfit params`: every key of params.yaml, its type, its default and what it means (docs/params.md)."""

from __future__ import annotations

import json
from typing import Any, get_args

import click

from core.cli import Command
from core.params import Params, Section


def page() -> str:
    """The reference of params.yaml as Markdown, made from the docstrings in core/params.py."""
    parts = [
        "# Every key of params.yaml",
        "Made by `tightfit params` from `core/params.py`; a test keeps it true.",
    ]
    for name, field in Params.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            rows = ["| key | value | default | meaning |", "|---|---|---|---|", *_rows(section, name)]
            parts.append(f"## {name}\n\n" + "\n".join(rows))
        else:
            parts.append(
                f"## {name}\n\n{_type(field)}, default `{_shown(field.default)}`. {field.description or ''}".rstrip()
            )
    return "\n\n".join(parts) + "\n"


def _rows(section: type[Section], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            rows += _rows(inner, f"{prefix}.{name}")
            continue
        default = "required" if field.is_required() else f"`{_shown(field.default)}`"
        meaning = (field.description or "").replace("\n", " ").replace("|", "\\|")
        rows.append(f"| `{prefix}.{name}` | {_type(field)} | {default} | {meaning} |")
    return rows


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)  # YAML reads JSON


def _type(field: Any) -> str:
    """The type in a user's words: "integer", "number", "a or b"."""
    words = {int: "integer", float: "number", str: "text", bool: "true or false"}

    def name(t: Any) -> str:
        if t in words:
            return words[t]
        if t is type(None):
            return "null"
        arguments = list(get_args(t))
        if arguments and all(isinstance(a, str) for a in arguments):
            return ", ".join(f"`{a}`" for a in arguments)
        if getattr(t, "__origin__", t) is list:
            return "list"
        if getattr(t, "__origin__", t) is dict:
            return "mapping"
        return " or ".join(dict.fromkeys(name(a) for a in arguments if isinstance(a, type) or get_args(a)))

    return name(field.annotation)


@click.command("params", cls=Command)
def main() -> None:
    """Explain every key of params.yaml."""
    click.echo(page(), nl=False)
