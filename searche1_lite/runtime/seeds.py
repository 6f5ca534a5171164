"""One seed derivation for the whole project.

Every random choice is drawn from a seed derived from the run's seed and the names of what is being drawn, such as
`derive_seed(run_seed, "rollout", round, step, question_id, sample)`. So a draw depends on what it is for, never on how
many draws came before it or on its neighbours in a batch.
"""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of integers and strings (BLAKE2b over their unambiguous encoding)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
