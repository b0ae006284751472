"""Model and images to numbers, and two models compared."""
