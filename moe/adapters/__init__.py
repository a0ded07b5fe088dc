"""Other libraries' weights and configurations, translated to and from ours. None of these libraries is imported."""
