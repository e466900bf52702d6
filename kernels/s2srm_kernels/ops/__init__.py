"""One file for each operation: contract, body (of a sequence operation its reference), registration, public function."""
