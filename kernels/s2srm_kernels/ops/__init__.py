"""One file for each operation: contract, body or reference, registration, public function."""
