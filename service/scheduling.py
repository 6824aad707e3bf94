"""Who runs next and who has had enough: plain decisions over numbers, without a thread and without a clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

ALIKE = 50
"""So many tokens of work are counted for every text, so that among short ones it is nearly the order of arrival."""


def most_urgent(waited: Sequence[float], work: Sequence[float]) -> int:
    """The text with the highest ratio of time waited to work asked, in tokens and ALIKE more; of equal ones the first.

    That is "highest response ratio next" (Brinch Hansen, 1971): a short text overtakes a long one, but whoever waits
    grows more urgent. With w the ratio of the most to the least work, who comes in the last 1/w of a text's wait cannot
    overtake it: once that part is as long as a full queue takes, the text has run. So it waits at most w full queues.

    Of several models the tokens are those of the dearest: what a cheaper one asks is as many times less.
    """
    ratios = [seconds / (asked + ALIKE) for seconds, asked in zip(waited, work, strict=True)]
    return ratios.index(max(ratios))


def choose_batch(lengths: Sequence[int], max_tokens: int, call_tokens: int) -> list[int]:
    """Which waiting texts run together with the first: places in `lengths`, where the others are nearest to it first.

    One after another joins while the padded batch stays within `max_tokens` and the padding that a text brings costs
    no more than the call of its own that it saves, `call_tokens`.
    """
    chosen, longest = [0], lengths[0]
    for place in range(1, len(lengths)):
        length = lengths[place]
        grown = max(longest, length)
        brought = longest - length if length <= longest else len(chosen) * (length - longest)
        if (len(chosen) + 1) * grown > max_tokens or brought > call_tokens:
            continue
        chosen.append(place)
        longest = grown
    return chosen


def cut_short(
    *, backlog: float, brown_out: float, time_left: float, turn: float
) -> Literal["overload", "deadline"] | None:
    """Why a text that allows fewer iterations is answered with those it has; None where it stays. All in seconds.

    `backlog` is how long the queue takes, `brown_out` from how much on that is too long, `turn` how long the engine's
    turns are at most: it is asked again after the next one, whoever's, and the answer has a way to go.
    """
    if backlog >= brown_out:
        return "overload"
    return "deadline" if time_left < 2 * turn else None


def patience(time_left: float, *, may_be_cut: bool) -> float:
    """How long a text may have to wait for others and still be taken, in seconds.

    Half of the time until its deadline, since its own turns come after them, and all of that is an estimate; the whole
    of it where one iteration is answer enough: that comes before the others have had all of theirs.
    """
    return time_left if may_be_cut else time_left / 2
