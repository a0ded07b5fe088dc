"""Command lines over the library; nothing imports them."""
