"""One module per command; each has `SUMMARY` (one line) and `run(argv) -> None`."""
