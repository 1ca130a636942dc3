"""The process and its machine: console, limits, clocks, files, and the process's end."""
