"""Where a simulation's inputs come from: readers of recorded traces, one file per format, and generators."""
