"""What is optimised: the objective, and the losses of other networks."""
