"""Is memory flat? What the soaks of servers hold a server to."""

import statistics
from collections.abc import Sequence
from typing import Any

MOST_MIB, MOST_SHARE = 5.0, 0.02
"""What the last minute may add to resident memory: so many MiB, and so large a share of it."""


def last_minute(mib: Sequence[float]) -> dict[str, Any]:
    """What a line through the last 60 looks, one a second, gains from the first of them to the last.

    The first quarter of all looks is left out: a server that has just begun takes memory for a while.

    Raises:
        AssertionError: if that is more than it may be.
    """
    last = mib[len(mib) // 4 :][-60:]
    gained = statistics.linear_regression(range(len(last)), last).slope * (len(last) - 1)
    assert gained < MOST_MIB and gained < MOST_SHARE * last[0], f"memory is not flat: {gained:.1f} MiB in {last}"
    return {"memory_gained_in_last_minute_mib": round(gained, 2)}
