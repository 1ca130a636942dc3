"""What a run does beside its steps, one policy a file: bad steps, rewinding, watchdog, profiler and others."""
