"""Captions: cleaning, alternatives, and what is said of those that are missing."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoencoder.sources.captions import clean_text, parse_captions


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_whole_texts_stay_as_they_are(text):
    assert clean_text(text) == text.removeprefix("\ufeff")


@given(st.text(alphabet=st.characters()) | st.text(alphabet="a\ud83d\ude00\udfff"))
def test_whatever_json_holds_can_be_encoded(text):
    cleaned = clean_text(json.loads(json.dumps(text)))
    cleaned.encode("utf-8")
    assert [c for c in cleaned if ord(c) < 128] == [c for c in text if ord(c) < 128]


def test_halves_that_belong_together_are_joined():
    assert clean_text("smile \ud83d\ude00") == "smile 😀"
    assert clean_text("smile \ud83d") == "smile "
    assert clean_text("\ufeffa bird") == "a bird"


@pytest.mark.parametrize(
    ("value", "captions"),
    [("a", ("a",)), (["a", "", " ", None, "b"], ("a", "b")), ("x\ud83d", ("x",)), (["\ud83d", "b"], ("b",))],
)
def test_usable_captions(value, captions):
    assert parse_captions({"prompt": value}, "prompt", "path", required=True) == captions


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "is null"), ("", "holds an empty caption"), ([], "is an empty list"), ([None], "holds an empty caption"),
     ("\ud83d", "holds an empty caption"), (5, "must be a text or a list of texts, got 5")],
)  # fmt: skip
def test_unusable_captions(value, message):
    with pytest.raises(ValueError, match=message):
        parse_captions({"prompt": value}, "prompt", "path", required=True)
    if value != 5:
        assert parse_captions({"prompt": value}, "prompt", "path", required=False) == ()
