"""How a step's sequences are shared out among passes: by padded tokens, those of like length together."""

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the sequences of each pass; every index comes once, the longest sequences first.

    A pass of n sequences counts as n times its longest. It counts at most `budget` tokens, but for a sequence that is
    longer by itself and goes alone. With the longest first, a step that does not fit into the memory fails at once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def fullest(longest: int, budget: int, sequences: int) -> tuple[int, int]:
    """Rows and columns of the largest micro-batch that `sequences` of up to `longest` tokens can make.

    Where the budget is no multiple of `longest`, one row more, all a little shorter, fills it up.
    """
    rows = min(sequences, max(1, -(-budget // longest)))
    return rows, longest if rows == 1 else min(longest, budget // rows)
