"""The mixture-of-experts model: router, dispatch, experts, combine, decoder. Knows no trainer."""
