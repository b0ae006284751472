"""Losses: the objective, and the losses of other networks."""
