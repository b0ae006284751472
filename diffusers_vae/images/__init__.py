"""Image files and value ranges: pixels in, pixels out."""
