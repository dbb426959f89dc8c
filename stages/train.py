"""train: the model that the plan describes, trained on the project's tokens."""

import click

from core.cli import command, say
from core.project import Project


@command("train")
@click.option("--fresh", is_flag=True, help="Forget what this run has done so far, and begin it again.")
def main(project: Project, fresh: bool) -> None:
    """Train the model that the plan describes (models/final). Goes on where an earlier life of the run ended."""
    from core.launch import run_training

    run_training(project, say, fresh)


if __name__ == "__main__":
    main()
