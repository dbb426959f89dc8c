"""env-check: what this machine is, which plan it gets, and whether it can run it."""

from core.cli import command, say
from core.project import Project


@command("env-check")
def main(project: Project) -> None:
    """Check this machine and resolve the plan (reports/plan.json)."""
    from core.env_check import env_check

    env_check(project, say)


if __name__ == "__main__":
    main()
