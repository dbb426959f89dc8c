"""How a table tells what was measured several times."""

import statistics


def spread(values: list[float], form: str = ".3f") -> str:
    """The median, and in brackets the smallest and the largest; of a single value only that."""
    median = format(statistics.median(values), form)
    return median if len(values) == 1 else f"{median} ({min(values):{form}} to {max(values):{form}})"
