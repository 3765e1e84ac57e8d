"""Container formats: a plan and a stream of packed rows become files. One file per format, found by its name."""
