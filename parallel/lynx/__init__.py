"""Recomputation of activations inside communication windows: plans and simulation (METHODS L1-L6; arXiv 2406.08756).

Free of torch: it runs wherever Python and scipy do.
"""
