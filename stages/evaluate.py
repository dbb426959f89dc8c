"""evaluate: bits per byte on held-out text, samples, and the report."""

from core.cli import command, say
from core.project import Project


@command("evaluate")
def main(project: Project) -> None:
    """Measure the final model and write reports/ (metrics.json, samples.md, report.html)."""
    from core.evaluate import evaluate

    evaluate(project, say)


if __name__ == "__main__":
    main()
