"""Compression of trained mixtures: layer, block and expert drop, slimming (METHODS C1-C7; arXiv 2406.02500)."""
