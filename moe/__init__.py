"""The mixture-of-experts model: router, dispatch, experts, combine, decoder. Knows no trainer.

Suffixes of tensor names are their dimensions:
T tokens on this rank, D model width, F expert hidden width, E all experts, e experts on this rank, K choices per
token, R rows received by this rank's experts, C capacity slots per (rank, expert), G ranks of the expert axis,
B blocks (or batch), S sequence, V vocabulary, H heads.
"""
