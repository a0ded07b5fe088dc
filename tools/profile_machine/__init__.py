"""`wastenot profile`: what the planner's cost model needs, measured on the machine at hand."""
