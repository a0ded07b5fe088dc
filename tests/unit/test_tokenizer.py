"""Tokenizers: what is encoded comes back, training is a function of the text, foreign files find their end token."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from wastenot.launch import tokenizer as tokenizer_module
from wastenot.launch.errors import UserError
from wastenot.launch.tokenizer import END_OF_TEXT, byte_tokenizer, load_tokenizer, parse_bpe_size, train_bpe

TEXTS = ["the cat sat on the mat\n\nand the hat\n" * 20, "naïve café, the end — 终\n" * 20]

# Any text, with what tokenizers treat specially made likely.
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([END_OF_TEXT, "\n", "\n\n ", "  ", "the "]))).map(
    "".join
)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 280)


@settings(deadline=None)
@given(text=TEXT)
def test_decoding_gives_back_the_text(bpe, text):
    for each in (byte_tokenizer(), bpe):
        tokens = each.encode(text)
        assert each.decode(tokens) == text
        assert each.end_token not in tokens
        assert all(0 <= token < each.vocab_size for token in tokens)


@settings(deadline=None)
@given(text=TEXT)
def test_bytes_are_their_own_tokens(text):
    each = byte_tokenizer()
    assert each.encode(text) == list(text.encode())
    assert (each.vocab_size, each.end_token) == (257, 256)


def test_bpe_has_the_size_asked_for_and_merges_what_is_frequent(bpe):
    assert (bpe.vocab_size, bpe.end_token) == (280, 0)
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_training_twice_gives_the_same_tokenizer(bpe):
    assert train_bpe(TEXTS, 280).fingerprint() == bpe.fingerprint()
    assert train_bpe(TEXTS, 279).fingerprint() != bpe.fingerprint()


def test_a_text_without_enough_pairs_gives_a_smaller_bpe():
    assert train_bpe(["ab"], 1000).vocab_size <= 258


@settings(deadline=None)
@given(text=TEXT, limit=st.integers(1, 20))
def test_a_long_text_is_encoded_in_pieces_that_give_it_back(bpe, text, limit):
    pieces = list(tokenizer_module._cut(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces[:-1])


def test_pieces_cut_at_lines_encode_as_the_whole(bpe, monkeypatch):
    text = "".join(f"line {number} of the\tcat\n{' ' * (number % 3)}\n" for number in range(200))
    whole = bpe.encode(text)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(tokenizer_module, "BATCH_CHARACTERS", 350)
    assert bpe.encode(text) == whole


def test_documents_are_a_stream_with_an_end_token_after_each(bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 7)
    monkeypatch.setattr(tokenizer_module, "BATCH_CHARACTERS", 20)
    documents = ["the cat", "", "a longer one\nover two lines", "end"]
    stream = [token for ids in bpe.encode_documents(iter(documents)) for token in ids]
    expected = [token for text in documents for token in [*bpe.encode(text), bpe.end_token]]
    assert stream == expected


def test_saved_tokenizers_load_from_folder_and_file(tmp_path, bpe):
    for each in (bpe, byte_tokenizer()):
        each.save(tmp_path)
        for place in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
            loaded = load_tokenizer(place)
            assert loaded.fingerprint() == each.fingerprint()
            assert loaded.encode(TEXTS[1]) == each.encode(TEXTS[1])


@pytest.fixture
def word_file(tmp_path):
    """A tokenizer of another kind: words, with padding and truncation switched on as published files have them."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "STOP": 7}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.mark.parametrize("named", ["STOP", {"content": "STOP", "lstrip": False}])
def test_end_token_is_the_one_that_the_neighbouring_config_names(word_file, named):
    word_file.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    loaded = load_tokenizer(word_file)
    assert (loaded.end_token, loaded.vocab_size) == (7, 8)
    assert loaded.encode("the cat the dog") == [1, 2, 1, 0]


@pytest.mark.parametrize("config", [None, {}, {"eos_token": "absent"}])
def test_a_tokenizer_without_an_end_token_is_refused(word_file, config):
    if config is not None:
        word_file.with_name("tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no end token found.*tokenizer_config\.json"):
        load_tokenizer(word_file)


def test_files_that_are_no_tokenizer_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json is no file"):
        load_tokenizer(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match=r"broken\.json: not a Hugging Face tokenizer"):
        load_tokenizer(broken)


def test_bpe_sizes_are_checked():
    assert parse_bpe_size("bpe:2048") == 2048
    assert parse_bpe_size("bytes") is None
    for spec, said in [("bpe", "names no size"), ("bpe:many", "names no size"), ("bpe:256", "use bpe:257 or more")]:
        with pytest.raises(UserError, match=said):
            parse_bpe_size(spec)
