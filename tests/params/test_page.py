"""docs/params.md says what core/params.py says."""

from __future__ import annotations

from pathlib import Path

from core.commands.params import page
from core.params import Params, Section

REPO = Path(__file__).parents[2]


def test_page_is_up_to_date():
    assert (REPO / "docs" / "params.md").read_text(encoding="utf-8") == page(), (
        "run: tightfit params > docs/params.md"
    )


def test_every_key_is_explained():
    def keys(section, prefix=""):
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from keys(field.annotation, f"{prefix}{name}.")
            elif prefix:
                yield f"{prefix}{name}"

    for key in keys(Params):
        assert f"| `{key}` |" in page()
