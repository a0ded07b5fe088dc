"""`wastenot compress`: the stages by which a trained model becomes a smaller one."""
