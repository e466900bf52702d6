"""One module per command with `run(argv) -> None`; the other modules are what they share."""
