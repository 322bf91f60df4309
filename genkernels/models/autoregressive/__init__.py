"""Models of discrete images, one value after the other, with an exact likelihood."""
