"""From a configuration file or a launcher to a finished training run."""
