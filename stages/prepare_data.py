"""Stage 2: the corpus, as documents on disk."""

from __future__ import annotations

import click

from core.cli import command
from core.corpus import prepare
from core.project import Project


@command("prepare-data")
def main(project: Project) -> None:
    """Read the corpus into documents, split into train and held-out by hash."""
    prepare(project, click.echo)


if __name__ == "__main__":
    main()
