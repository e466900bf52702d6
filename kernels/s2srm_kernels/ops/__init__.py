"""One file for each operation: contract, reference, registration, public function."""
