"""What a run does beside its steps, one policy a file: bad steps, watchdog, profiler and others; see policy.py."""
