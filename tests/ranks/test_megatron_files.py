"""Files of Megatron's: its datasets, read and written as it does, in a process of its own."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spawned import run_ranks

from wastenot.launch.indexed import IndexedTokens, write_indexed

# Megatron-Core warns about CUDA libraries that a CPU does not have.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core"),
]

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 127), min_size=1, max_size=5), max_size=3), max_size=5)


def datasets(rank: int, world: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    @settings(deadline=None, max_examples=50, database=None)
    @given(st.lists(st.lists(st.integers(0, 2**15 - 1), max_size=9), max_size=6), st.sampled_from([65499, 65500]))
    def megatron_reads_what_we_write(documents: list[list[int]], vocab_size: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prefix = Path(folder) / "name.with.dots"
            counts = write_indexed(prefix, documents, vocab_size)
            assert counts == {"documents": len(documents), "tokens": sum(map(len, documents))}
            if counts["tokens"]:  # Megatron maps no empty file.
                theirs = IndexedDataset(str(prefix))
                assert theirs.index.dtype == DType.optimal_dtype(vocab_size)
                assert [theirs[index].tolist() for index in range(len(theirs))] == documents
                assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
            assert [ids.tolist() for ids in IndexedTokens.open(prefix)] == documents

    @settings(deadline=None, max_examples=50, database=None)
    @given(DOCUMENTS, st.sampled_from(["uint8", "int8", "int16", "int32", "int64", "uint16"]))
    def we_read_what_megatron_writes(documents: list[list[list[int]]], dtype: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prefix = Path(folder) / "theirs"
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype))
            for sequences in documents:
                for sequence in sequences:
                    builder.add_item(torch.tensor(sequence))
                builder.end_document()
            builder.finalize(f"{prefix}.idx")
            ours = IndexedTokens.open(prefix)
            assert ours.tokens.dtype == np.dtype(dtype)
            expected = [[token for sequence in sequences for token in sequence] for sequences in documents]
            assert [ids.tolist() for ids in ours] == expected

    megatron_reads_what_we_write()
    we_read_what_megatron_writes()


def test_megatron_reads_the_datasets_we_write_and_we_read_its():
    run_ranks(1, datasets, timeout=120.0)
