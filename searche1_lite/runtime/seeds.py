"""One seed derivation for the whole project.

Each random choice is drawn from a seed derived from the run's seed and the name of the choice, such as
`derive_seed(run_seed, "rollout", round, step, question_id, sample)`. So a draw depends neither on the number of earlier
draws nor on the rest of its batch.
"""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of integers and strings (BLAKE2b over their unambiguous encoding)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
