"""Which plates within a row's hold elements that are independent given all outside of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise

from numpyro_vae.model.provenance import RANDOM, Names
from numpyro_vae.model.sites import Site


def independent_plates(
    sites: Collection[Site],
    plates: Mapping[str, Names],
    reads: Mapping[str, Names],
    mixed: Names = frozenset(),
) -> tuple[Names, str]:
    """Return those plates around enumerated sites whose elements can be summed over one by one.

    That is so if no site outside such a plate is computed from the enumerated values in it, and the
    sets of plates whose values come together in a site lie within each other.

    Args:
        sites: the enumerated sites.
        plates: by name of any site, the plates around it.
        reads: by name of any site, what its log-density is computed from.
        mixed: plates in which elements depend on the values in others all the same.

    Returns:
        The plates, and of the others why; empty if there are no others.
    """
    names = {site.name for site in sites}
    kept = _union(plates[name] for name in names)
    why = f"The elements of {sorted(kept & mixed)} depend on each other" if kept & mixed else ""
    kept -= mixed
    while True:
        found = {name: _levels(name, names, kept, plates, reads) for name in plates}
        broken = {name: _broken(levels, plates[name]) & kept for name, levels in found.items()}
        first = next((name for name in broken if broken[name]), None)
        if first is None:
            return kept, why
        why = why or _explain(first, plates, broken[first], sorted(names & _read(first, reads)))
        kept -= _union(broken.values())


def _levels(
    name: str, names: set[str], kept: Names, plates: Mapping[str, Names], reads: Mapping[str, Names]
) -> set[Names]:
    """Return the sets of plates of the enumerated values that come together in a site."""
    read = names if RANDOM in reads[name] else names & _read(name, reads)
    levels = {plates[x] & kept for x in read}
    if name not in names:
        return levels
    return levels | {plates[x] & kept for x in names if plates[x] & kept <= plates[name]}


def _read(name: str, reads: Mapping[str, Names]) -> Names:
    return reads[name] | {name}


def _broken(levels: set[Names], around: Names) -> Names:
    """Return the plates that a site, with others around it, does not let be independent."""
    outside = _union(levels) - around
    apart = (a ^ b for a, b in pairwise(sorted(levels, key=len)) if not a <= b)
    return outside | _union(apart)


def _union(sets: Iterable[Names]) -> Names:
    return frozenset().union(*sets)


def _explain(name: str, plates: Mapping[str, Names], broken: Names, read: list[str]) -> str:
    outside = sorted(broken - plates[name])
    if outside:
        return f"Site {name!r} depends on the values of {read} in all elements of plates {outside}"
    return (
        f"Site {name!r} depends on the values of {read} in plates {sorted(broken)}, of which none "
        "lies within the other"
    )
