"""Files of Megatron's datasets: training on them is the same, broken ones are named (ranks/test_megatron_files.py
reads theirs)."""

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wastenot.launch import indexed_corpus
from wastenot.launch.config import DataConfig
from wastenot.launch.corpus import prepare
from wastenot.launch.errors import UserError
from wastenot.launch.indexed import IndexedTokens, find_indexed, write_indexed
from wastenot.launch.metrics import read_metrics
from wastenot.launch.shards import TokenShards, read_meta
from wastenot.launch.tokenizer import FILE_NAME
from wastenot.tools.cli import main

LINES = [f"{number} bottles of naïve beer on the wall — take {number % 7} down\n" for number in range(400)]


@pytest.fixture
def prepared(tmp_path):
    """A small prepared corpus of several documents."""
    path = tmp_path / "beer.jsonl"
    texts = ["".join(LINES[first : first + 80]) for first in range(0, 400, 80)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(DataConfig(corpus=str(path), tokenizer="bpe:300", dir=str(tmp_path / "data"), val_fraction=0.1))


def test_an_exported_corpus_comes_back_and_trains_alike(prepared, tmp_path, capsys):
    prefix = tmp_path / "exported" / "beer"
    assert main(["data", "export", str(prepared), str(prefix), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["train"]["documents"] == 5
    assert set(find_indexed(str(prefix))) == {"train", "val"} and set(find_indexed(f"{prefix}-train.idx")) == {None}
    settings = [f"data.tokenizer={prepared / FILE_NAME}", f"data.dir={tmp_path / 'again'}"]
    runs = {}
    for name, corpus in (("prepared", prepared), ("exported", prefix)):
        log = tmp_path / name
        config = tmp_path / f"{name}.yaml"
        config.write_text(
            "model: {d_model: 16, layers: 1, heads: 2, moe: {experts: 2, d_expert: 16}}\n"
            "router: {top_k: 1}\nlog: {every: 1, tensorboard: false}\nschedule: {warmup_steps: 1}\n"
            "train: {steps: 3, batch: 2, sample_tokens: 0}\ncheckpoint: {every: 3}\n"
            "data: {seq_len: 16}\n"
        )
        sets = [*settings, f"data.corpus={corpus}", f"log.dir={log}"]
        command = [sys.executable, "-m", "wastenot.tools.cli", "train", config]
        command += [word for each in sets for word in ("-s", each)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        runs[name] = [
            (line["step"], line.get("loss"), line.get("val_loss"), line.get("val_bits_per_byte"))
            for line in read_metrics(log)
            if "step" in line
        ]
    assert runs["prepared"] == runs["exported"]
    assert len(runs["prepared"]) >= 3
    [again] = (tmp_path / "again").glob("beer_train-tokens-*")
    figures = [read_meta(folder) for folder in (prepared, again)]
    assert figures[0]["splits"] == figures[1]["splits"]
    assert figures[0]["ngram_bits_per_byte"] == figures[1]["ngram_bits_per_byte"]


def test_one_dataset_is_split_between_characters_and_end_tokens_end_documents(prepared, tmp_path):
    """One whole document, one whose end token stands within, one of nothing else."""
    from wastenot.launch.tokenizer import byte_tokenizer

    texts, tokenizer = ["né" * 50, "a" * 20, "b" * 20], byte_tokenizer()
    first, second, third = (tokenizer.encode(text) for text in texts)
    prefix, end = tmp_path / "bytes", tokenizer.end_token
    write_indexed(prefix, [[*first, end], [*second, end, *third], [end], []], tokenizer.vocab_size)
    folder = prepare(DataConfig(corpus=f"{prefix}.idx", tokenizer="bytes", dir=str(tmp_path), val_fraction=0.125))
    shards = {split: TokenShards.open(folder, split) for split in ("train", "val")}
    for split in shards.values():
        assert split.num_documents == 3
        assert "\ufffd" not in tokenizer.decode(split.read(0, split.num_tokens).tolist())
        assert split.num_text_bytes == split.num_tokens - 3
    assert sum(split.num_text_bytes for split in shards.values()) == sum(len(text.encode()) for text in texts)


def broken(folder: Path, change: str) -> Path:
    """A pair of files with something wrong."""
    prefix = folder / "broken"
    write_indexed(prefix, [[1, 2, 3], [4]], 100)
    index, ids = (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
    raw = bytearray(index.read_bytes())
    if change == "text":
        raw = bytearray(b"once upon a time" * 9)
    elif change == "version":
        raw[9:17] = struct.pack("<Q", 2)
    elif change in ("float", "kind"):
        raw[17] = 6 if change == "float" else 77
    elif change == "cut":
        raw = raw[:-3]
    elif change == "multimodal":
        raw += b"\x00\x01"
    elif change == "documents":
        raw[-8:] = struct.pack("<q", 9)
    elif change == "length":
        raw[34:38] = struct.pack("<i", -1)
    elif change == "ids":
        ids.write_bytes(ids.read_bytes()[:-2])
    elif change == "half":
        ids.write_bytes(ids.read_bytes()[:-1])
    elif change == "none":
        ids.unlink()
    index.write_bytes(raw)
    return prefix


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("text", "not an index of Megatron's datasets"),
        ("version", "has version 2; only version 1"),
        ("float", "its entries are of float64, not token ids"),
        ("kind", "its entries are of unknown kind 77"),
        ("cut", r"\d+ bytes, its header says \d+; it is cut short"),
        ("multimodal", "is multimodal"),
        ("documents", "its documents do not follow each other"),
        ("length", "has a sequence of negative length"),
        ("ids", "holds 3 ids, its index asks for 4"),
        ("half", "7 bytes are no whole number of uint16"),
        ("none", "broken.bin: cannot be read"),
    ],
)
def test_broken_files_are_named(tmp_path, change, said):
    with pytest.raises(UserError, match=said) as error:
        IndexedTokens.open(broken(tmp_path, change))
    assert "\n" not in str(error.value) and str(tmp_path / "broken") in str(error.value)


def test_what_cannot_be_trained_on_is_said(prepared, tmp_path, capsys):
    prefix = tmp_path / "ids"
    write_indexed(prefix, [[1, 299, 300]], 1000)
    words = ["data", "prepare", f"{prefix}.idx", "--dir", str(tmp_path / "none")]
    for tokenizer, said in (
        ("bpe:300", "bpe:300 would be trained on text"),
        (str(prepared / FILE_NAME), "document 0 has the id 300, and data.tokenizer ids from 0 to 299"),
    ):
        assert main([*words, "--tokenizer", tokenizer]) == 2
        assert said in capsys.readouterr().err
    assert main(["data", "export", str(prepared)]) == 2
    assert "takes a prepared folder and a PREFIX" in capsys.readouterr().err
    for split, (full, empty) in {"val": ("train", "val"), "train": ("val", "train")}.items():
        pair = tmp_path / f"no-{split}"
        write_indexed(Path(f"{pair}-{full}"), [[1, 2, 3]], 300)
        write_indexed(Path(f"{pair}-{empty}"), [], 300)
        assert main(["data", "prepare", str(pair), "--tokenizer", "bytes", "--dir", str(tmp_path / "none")]) == 2
        said = capsys.readouterr().err
        assert f"{pair}-{empty}.idx: holds no text" in said and "val_fraction" not in said
    assert not [path for path in (tmp_path / "none").iterdir() if path.suffix != ".lock"]


def test_an_export_leaves_all_its_files_or_none(prepared, tmp_path, capsys):
    prefix = tmp_path / "exports" / "beer"
    words = ["data", "export", str(prepared), str(prefix)]
    prefix.parent.mkdir()
    for name in ("train.bin", "train.idx", "val.bin", "val.idx"):
        taken = Path(f"{prefix}-{name}")
        taken.write_bytes(b"theirs")
        assert main(words) == 2
        assert f"{taken}: exists" in capsys.readouterr().err
        assert list(prefix.parent.iterdir()) == [taken] and taken.read_bytes() == b"theirs"
        taken.unlink()
    # Folders stand where the second file, and then the second split, are first written.
    for name in ("train.idx", "val.bin"):
        blocked = Path(f"{prefix}-{name}.part")
        blocked.mkdir()
        assert main(words) == 2
        assert "cannot be written" in capsys.readouterr().err
        assert list(prefix.parent.iterdir()) == [blocked]
        blocked.rmdir()

    def documents():
        yield [1]
        # Only the index's place is taken while the ids are written: its rename fails, after that of the ids.
        Path(f"{prefix}.idx").mkdir()

    with pytest.raises(UserError, match="cannot be written"):
        write_indexed(prefix, documents(), 300)
    assert [path.name for path in prefix.parent.iterdir()] == ["beer.idx"]
    assert main(words) == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_files_are_known_again_by_their_index_and_blocks_of_the_ids(tmp_path, monkeypatch):
    """More than 66 blocks, small ones here, so that not all is read."""
    prefix, size, block = tmp_path / "large", 8192, 64
    monkeypatch.setattr(indexed_corpus, "_BLOCK_BYTES", block)
    ids = np.full(size // 2, ord("a"), dtype="<u2")
    ids[::7] = ord("b")
    write_indexed(prefix, [ids], 300)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def prepared_for(progress: bool = False) -> tuple[Path, str]:
        """The folder, and what was shown."""
        folder = prepare(DataConfig(corpus=str(prefix), tokenizer="bytes", dir=str(tmp_path)), progress)
        shown = terminal.getvalue()
        terminal.truncate(0)
        return folder, shown

    def change(place: int) -> None:
        with Path(f"{prefix}.bin").open("r+b") as file:
            file.seek(place)
            file.write(b"c\0")

    first, shown = prepared_for(progress=True)
    assert "reading large, train" in shown
    assert prepared_for(progress=True) == (first, "")
    change(block)
    assert prepared_for()[0] == first, "between the first block and the next"
    known = {first}
    for place in (0, block - 2, (size - block) // 65 // 2 * 2 + 2, (size - block) * 64 // 65 // 2 * 2 + 2, size - 2):
        change(place)
        folder, shown = prepared_for()
        assert shown == ""
        known.add(folder)
    assert len(known) == 6
    files = read_meta(first)["files"]["None"]
    assert files["bin_bytes"] == size
    assert files["idx_sha256"] == hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()
