"""How a weight is rounded to a codec's grid: one file per method, found by its name."""
