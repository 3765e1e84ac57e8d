"""The command line: turns strings into arguments, and results into text or JSON. The work is done elsewhere."""
