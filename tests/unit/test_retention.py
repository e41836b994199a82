from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetion_lightning.storage.format import FileRecord
from moetion_lightning.storage.retention import files_to_drop, windows_to_keep
from tests.store_windows import make_manifest


@given(st.lists(st.integers(0, 50)), st.integers(1, 5))
def test_the_newest_windows_are_kept(iterations, keep):
    kept = windows_to_keep(iterations, keep)
    assert kept == sorted(set(iterations))[::-1][:keep]


def test_the_newest_window_cannot_be_given_up():
    with pytest.raises(ValueError, match="keep=0"):
        windows_to_keep([1], 0)


@given(st.lists(st.sets(st.sampled_from("abcde"))), st.sets(st.sampled_from("abcdefg")))
def test_only_files_that_no_kept_window_names_are_dropped(named, existing):
    records = {c: FileRecord(f"{c}.safetensors", 1, "xxh3:" + "0" * 32) for c in "abcdefg"}
    manifests = [make_manifest(i, [records[c] for c in sorted(names)]) for i, names in enumerate(named)]
    dropped = files_to_drop(manifests, [records[c].name for c in existing])
    assert dropped == sorted(f"{c}.safetensors" for c in existing - set().union(*named))
