"""Stage 2: the corpus, as documents on disk."""

from __future__ import annotations

from core.cli import command, say
from core.corpus import prepare
from core.project import Project


@command("prepare-data")
def main(project: Project) -> None:
    """Read the corpus into documents, split into train and held-out by hash."""
    prepare(project, say)


if __name__ == "__main__":
    main()
