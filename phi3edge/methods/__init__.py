"""How a weight is rounded to a codec's grid: one file per method, found by its name."""

SCALED = ("awq", "awq+gptq")
"""Methods that scale channels before they round; after a "+", the method that rounds."""

CALIBRATED = ("gptq", *SCALED)
"""Methods that need the model to run on a text first: phi3edge.calibrate carries them out, block by block."""
