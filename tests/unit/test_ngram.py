"""Witten-Bell byte models: a case worked by hand, a plain dictionary version, and the laws of probability."""

import math
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.launch.ngram import MAX_ORDER, witten_bell_bits_per_byte, witten_bell_curve

# Few letters, so that contexts repeat.
TEXT = st.binary(max_size=40).map(lambda data: bytes(97 + byte % 3 for byte in data))
TEXTS = st.lists(TEXT, min_size=1, max_size=4).filter(any)


def test_a_case_worked_by_hand():
    # "aab": a twice, b once, two different bytes; after a came a and b, once each.
    p_a = (2 + 2 / 256) / (3 + 2)
    p_b = (1 + 2 / 256) / (3 + 2)
    p_b_after_a = (1 + 2 * p_b) / (2 + 2)
    curve = witten_bell_curve([b"aab"], [b"ab"], 1)
    assert curve[0] == pytest.approx(-(math.log2(p_a) + math.log2(p_b)) / 2)
    assert curve[1] == pytest.approx(-(math.log2(p_a) + math.log2(p_b_after_a)) / 2)


def test_a_byte_never_seen_gets_its_share_of_the_uniform():
    # "aa": one byte value seen twice, so order 0 keeps 1/(2 + 1) for the uniform.
    assert witten_bell_bits_per_byte([b"aa"], [b"z"], 0) == pytest.approx(-math.log2(1 / 3 / 256))


def test_contexts_end_where_a_text_ends():
    # In one text b follows a; in two texts nothing does, and b falls back to order 0.
    joined = witten_bell_bits_per_byte([b"ab"], [b"ab"], 1)
    parted = witten_bell_bits_per_byte([b"a", b"b"], [b"ab"], 1)
    assert parted == pytest.approx(witten_bell_bits_per_byte([b"ab"], [b"ab"], 0))
    assert joined < parted
    assert witten_bell_bits_per_byte([b"ab"], [b"a", b"b"], 1) == pytest.approx(parted)


@settings(max_examples=60, deadline=None)
@given(train=TEXTS, val=TEXTS)
def test_equals_the_formula_written_with_dictionaries(train, val):
    order = 5
    counts = defaultdict(lambda: defaultdict(int))
    for text in train:
        for place, byte in enumerate(text):
            for length in range(min(place, order) + 1):
                counts[text[place - length : place]][byte] += 1

    def probability(context, byte):
        shorter = probability(context[1:], byte) if context else 1 / 256
        after = counts.get(context)
        if after is None:
            return shorter
        return (after.get(byte, 0) + len(after) * shorter) / (sum(after.values()) + len(after))

    curve = witten_bell_curve(train, val, order)
    for length in range(order + 1):
        bits = [
            -math.log2(probability(text[max(0, i - length) : i], text[i])) for text in val for i in range(len(text))
        ]
        assert curve[length] == pytest.approx(sum(bits) / len(bits), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(train=TEXTS, context=TEXT.filter(bool), order=st.integers(0, 5))
def test_probabilities_of_the_next_byte_sum_to_one(train, context, order):
    def of_text(text):
        return 2 ** -(len(text) * witten_bell_bits_per_byte(train, [text], order))

    total = sum(of_text(context + bytes([byte])) for byte in range(256))
    assert total == pytest.approx(of_text(context), rel=1e-9)


def test_longest_order_fits_a_key():
    text = bytes(range(8)) * 3
    assert witten_bell_bits_per_byte([text], [text], MAX_ORDER) < witten_bell_bits_per_byte([text], [text], 0)


@pytest.mark.parametrize(
    ("train", "val", "order"), [([b"a"], [b"a"], 8), ([b"a"], [b"a"], -1), ([b""], [b"a"], 1), ([b"a"], [], 1)]
)
def test_what_cannot_be_computed_is_refused(train, val, order):
    with pytest.raises(ValueError, match=r"order|byte"):
        witten_bell_curve(train, val, order)
