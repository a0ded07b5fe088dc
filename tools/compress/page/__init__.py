"""The page about one compression: what went and why, what is kept, how fast it is, and what nobody measured."""
