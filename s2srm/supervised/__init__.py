"""One module per training stage, each with `run(config) -> RunResult`."""
