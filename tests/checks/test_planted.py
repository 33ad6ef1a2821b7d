"""Every planted failure is found by the checks that the docs say, and by no other."""

import pathlib
import re

import planted
import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "checks.md"


def table():
    """By row of the table in the docs, which checks it says find what was planted."""
    page = PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^\| .* \|$", page[page.index("| Planted |") :], re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    checks = cells[0][1:]
    return {
        row[0]: {check for check, cell in zip(checks, row[1:], strict=True) if cell}
        for row in cells[2:]
    }, checks


FOUND, CHECKS = table()


@pytest.mark.slow
@pytest.mark.parametrize("row", planted.PLANTED)
def test_a_failure_is_found_as_the_docs_say(row):
    assert planted.found_by(planted.PLANTED[row]()) == FOUND[row]


def test_each_check_finds_one_failure_and_importance_every_wrong_guide():
    assert list(FOUND) == list(planted.PLANTED)
    nothing, *found = FOUND.values()
    assert not nothing
    assert [checks - {"importance"} for checks in found] == [set(), *({c} for c in CHECKS[1:])]
    assert ["importance" in checks for checks in found] == [True] * 4 + [False] * 3
