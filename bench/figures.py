"""How a table tells what was measured several times."""

import statistics
from collections.abc import Callable


def spread(
    values: list[float], form: str = ".3f", middle: Callable[[list[float]], float] = statistics.median
) -> str:
    """The middle, and in brackets the smallest and the largest; of a single value only that."""
    told = format(middle(values), form)
    return told if len(values) == 1 else f"{told} ({min(values):{form}} to {max(values):{form}})"
