import re
from typing import get_args

import pytest

from photogram.core.errors import Conflict
from photogram.jobs.record import FINISHED, TRANSITIONS, UNFINISHED, IllegalTransition, JobState, new_id


def test_every_state_has_its_row_and_leads_only_to_states():
    assert set(TRANSITIONS) == set(get_args(JobState))
    assert set().union(*TRANSITIONS.values()) <= set(TRANSITIONS)
    assert set(FINISHED) == {"completed", "failed", "cancelled"}


def test_every_unfinished_job_may_fail_be_cancelled_and_at_last_complete():
    for state in UNFINISHED:
        assert {"failed", "cancelled"} <= TRANSITIONS[state]
        reached = {state}
        while wider := set().union(*(TRANSITIONS[each] for each in reached)) - reached:
            reached |= wider
        assert "completed" in reached


def test_a_file_is_encoded_before_its_job_is_complete():
    assert [state for state, following in TRANSITIONS.items() if "completed" in following] == ["encoding"]


def test_ids_are_random_and_of_one_form():
    ids = {new_id("img") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(r"img_[0-9a-f]{32}", each) for each in ids)
    with pytest.raises(ValueError):
        new_id("../x")


def test_an_illegal_move_says_what_would_be_allowed():
    error = IllegalTransition("img_1", "queued", "completed")
    assert isinstance(error, Conflict)
    assert error.message == "job 'img_1' is queued and cannot become completed (allowed: cancelled, failed, running)."
