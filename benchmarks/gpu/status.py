"""Exit statuses of the commands that measure on a GPU."""

DONE, FAILED, MISUSED, NO_GPU = 0, 1, 2, 3
"""All that could run is done; something failed; the command line, or the place, is wrong; there is no NVIDIA GPU."""
