"""The process and its machine: console, limits of resources, files, running time, and the process's end."""
