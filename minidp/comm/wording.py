"""What messages say of ranks: who they are, where they wait, and what they disagree about."""

from __future__ import annotations

MOST_LISTED = 8  # neighbours that are named one by one: of 1000 ranks a list would bury the message


def describe(header: str, sequence: int, group: str) -> str:
    """``all_reduce #412 (float32 (784, 512), sum)``, from a collective's header, number and group."""
    operation, _, rest = header.partition(" ")
    return f"{operation} #{sequence}{_of(group)}" + (f" ({rest})" if rest else "")


def disagreement(said: dict[str, list[int]], sequence: int, group: str) -> str:
    """What CollectiveMismatch tells where ranks bring different headers: {header: ranks}."""
    what = "; ".join(name_ranks(ranks, f"called {text}") for text, ranks in said.items())
    return (
        f"the ranks disagree at collective #{sequence}{_of(group)}: {what}. All ranks must call the same "
        "operations in the same order, with equal shapes and dtypes"
    )


def stuck(where: str) -> str:
    """What it tells where all wait for each other; ``where`` they all are."""
    return (
        f"ranks wait for each other and none can go on: {where}. All ranks must call the same operations in the "
        "same order"
    )


def left_waiting(where: str) -> str:
    """What it tells where ranks wait for one that has returned."""
    return (
        f"{where}. A rank that returns must leave nobody waiting: all ranks must call the same operations in the "
        "same order"
    )


def _of(group: str) -> str:
    return "" if group == "world" else f" of {group}"


def name_places(places: dict[str, list[int]], servers_from: int | None = None) -> str:
    """``rank 2 returned; ranks 0, 1, 3 wait in …``, from {place: ranks}; those who do not wait come first."""
    order = sorted(places, key=lambda place: (place != "returned", place.startswith("wait"), places[place]))
    return "; ".join(name_ranks(places[place], place, servers_from) for place in order)


def name_of_all(rank: int, world_size: int, servers_from: int) -> str:
    """``rank 2 of 4``, or ``server 0 of 2``."""
    many = servers_from if rank < servers_from else world_size - servers_from
    return f"{name_ranks([rank], servers_from=servers_from)} of {many}"


def name_ranks(ranks: list[int], verb: str = "", servers_from: int | None = None) -> str:
    """``rank 2 waits in …`` or ``ranks 0, 1, 3 wait in …``; ``verb`` is the plural.

    Ranks from ``servers_from`` on are servers, numbered from 0: ``rank 3 and server 0 wait in …``.
    """
    if len(ranks) == 1:
        for plural, singular in (("wait ", "waits "), ("compute", "computes")):
            if verb.startswith(plural):
                verb = singular + verb[len(plural) :]
    first = max(ranks, default=0) + 1 if servers_from is None else servers_from
    kinds = {"rank": [r for r in ranks if r < first], "server": [r - first for r in ranks if r >= first]}
    who = " and ".join(f"{kind}{'s' * (len(them) > 1)} {_listed(them)}" for kind, them in kinds.items() if them)
    return f"{who}{verb}" if verb.startswith(":") else f"{who} {verb}".rstrip()


def _listed(numbers: list[int]) -> str:
    """``0, 1, 3``; of long runs only the ends: ``0, 2 to 98``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > MOST_LISTED else ", ".join(map(str, r)) for r in runs)
