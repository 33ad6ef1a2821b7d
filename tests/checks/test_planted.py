"""Every planted failure is found by the check that is meant for it, and by no other."""

import pathlib
import re

import planted
import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def test_nothing_is_found_where_nothing_is_wrong():
    assert planted.found_by(planted.healthy()) == set()


@pytest.mark.parametrize("check", planted.PLANTED)
def test_a_failure_is_found_by_its_check_alone(check):
    assert planted.found_by(planted.PLANTED[check]()) == {check}


def test_the_table_in_the_docs_says_so():
    page = (DOCS / "checks.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| .* \|$", page[page.index("| Planted |") :], re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    checks, rows = cells[0][1:], cells[2:]
    assert checks == list(planted.PLANTED)
    found = [[check for check, cell in zip(checks, row[1:], strict=True) if cell] for row in rows]
    assert found == [[], *([check] for check in checks)]
