"""What trains the model of a run: wastenot's own runtime, or an engine that people run already."""
