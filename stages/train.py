"""train: the model that the plan describes, trained on the project's tokens."""

import click

from core.cli import command
from core.project import Project


@command("train")
def main(project: Project) -> None:
    """Train the model that the plan describes (models/final)."""
    from core.launch import run_training

    run_training(project, click.echo)


if __name__ == "__main__":
    main()
