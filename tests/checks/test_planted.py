"""Every planted failure is found by the check that is meant for it, and by no other."""

import planted
import pytest


def test_nothing_is_found_where_nothing_is_wrong():
    assert planted.found_by(planted.healthy()) == set()


@pytest.mark.parametrize("check", planted.PLANTED)
def test_a_failure_is_found_by_its_check_alone(check):
    assert planted.found_by(planted.PLANTED[check]()) == {check}
