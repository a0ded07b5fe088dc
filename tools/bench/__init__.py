"""Benchmarks by name: `wastenot bench NAME` prints what was measured and which goals are met."""
