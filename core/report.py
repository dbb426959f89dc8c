"""The report: one HTML file that opens offline, with its pictures inside."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import read_json, write_text
from core.project import Project


def write_report(
    project: Project,
    metrics: dict[str, Any],
    trained: dict[str, Any],
    warnings: list[str],
    samples: list[tuple[str, str]],
    network: Any,
    facts: dict[str, Any],
) -> None:
    """Write reports/report.html. Everything that comes from the corpus is escaped."""
    from jinja2 import Environment, FileSystemLoader

    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    env.filters["thousands"] = lambda n: f"{n:,}"
    page = env.get_template("report.html.j2").render(
        metrics=metrics,
        trained=trained,
        warnings=warnings,
        samples=samples,
        parameters=parameter_table(network),
        facts=facts,
        plan=read_json(project.plan, made_by="python -m stages.env_check"),
        tokens=read_json(project.tokens / "manifest.json", made_by="python -m stages.tokenize"),
        pictures=pictures(
            read_table(project.reports / "curve.tsv"), read_table(project.reports / "curve_val.tsv")
        ),
    )
    write_text(project.reports / "report.html", page)


def read_table(path: Path) -> dict[str, list[float]]:
    """A TSV of numbers as columns. Raises UserError where it is missing or damaged."""
    columns: dict[str, list[float]] = defaultdict(list)
    try:
        with path.open(encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f, delimiter="\t"):
                for name, value in row.items():
                    columns[name].append(float(value))
    except (OSError, ValueError, TypeError, csv.Error) as e:
        why = "is missing" if isinstance(e, FileNotFoundError) else f"is damaged ({e})"
        raise UserError(f"{path} {why}. Run `python -m stages.train` again (or `dvc repro`).") from None
    return columns


def parameter_table(network: Any) -> list[dict[str, Any]]:
    """Parameters by part, layers summed up: name, shape, count, how many of them, share."""
    total = sum(p.numel() for p in network.parameters())
    rows: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        part = ".".join("*" if piece.isdigit() else piece for piece in name.split("."))
        row = rows.setdefault(
            part, {"name": part, "shape": "x".join(map(str, parameter.shape)), "n": 0, "count": 0}
        )
        row["n"] += 1
        row["count"] += parameter.numel()
    for row in rows.values():
        row["share"] = row["count"] / total
    return list(rows.values())


def pictures(train: dict[str, list[float]], val: dict[str, list[float]]) -> dict[str, str]:
    """Inline SVG: loss over tokens, and the learning rate."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
        "svg.hashsalt": "tightfit",  # equal curves give equal bytes
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 3.6))
        axes = figure.subplots()
        millions = [t / 1e6 for t in train["tokens"]]
        axes.plot(millions, train["loss"], color="#7aa6c2", linewidth=1.2, label="training")
        axes.plot(
            [t / 1e6 for t in val["tokens"]],
            val["val_loss"],
            color="#c2452d",
            marker="o",
            markersize=3.5,
            label="held out",
        )
        axes.set(xlabel="million tokens", ylabel="loss [nats per token]")
        axes.legend(frameon=False)
        loss = _svg(figure)
        figure = Figure(figsize=(8, 1.8))
        axes = figure.subplots()
        axes.plot(millions, train["lr"], color="#4b7f52")
        axes.set(xlabel="million tokens", ylabel="learning rate")
        axes.set_ylim(bottom=0)
        lr = _svg(figure)
    return {"loss": loss, "lr": lr}


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML prologue, which has no place inside HTML
