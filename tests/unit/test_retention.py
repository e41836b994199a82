from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetion_lightning.storage.disk import windows_to_keep


@given(st.lists(st.integers(0, 50)), st.integers(1, 5))
def test_the_newest_windows_are_kept(iterations, keep):
    kept = windows_to_keep(iterations, keep)
    assert kept == sorted(set(iterations))[::-1][:keep]


def test_the_newest_window_cannot_be_given_up():
    with pytest.raises(ValueError, match="keep=0"):
        windows_to_keep([1], 0)
