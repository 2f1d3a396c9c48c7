"""Splitting off: each label in proportion, nothing lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from sentence_classifier.errors import InputError
from text.splitting import apportion


@settings(max_examples=300, deadline=None)
@given(sizes=st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(1, 60), min_size=1),
       valid=st.floats(0.01, 0.4), test=st.floats(0.01, 0.4), spare=st.integers(0, 1))
def test_each_label_gives_its_share(sizes: dict[str, int], valid: float, test: float, spare: int) -> None:
    shares = {"test.txt": test, "valid.txt": valid}
    try:
        dealt = apportion(Counter(sizes), shares, spare)
    except InputError:
        assert sum(count - spare for count in sizes.values()) < 1 + max(1, round(test * sum(sizes.values())))
        return
    for label, count in sizes.items():
        taken = {name: quota[label] for name, quota in dealt.items()}
        assert sum(taken.values()) <= count - spare and min(taken.values()) >= 0
        for name, share in shares.items():
            assert taken[name] <= share * count + 1
            assert taken[name] > share * count - 1 or sum(taken.values()) == count - spare
    assert all(quota.total() for quota in dealt.values())
