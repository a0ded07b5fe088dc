"""YAML configurations that come with the package: data only."""
