"""`make gpu`: everything that a machine with a GPU is for, in one command."""
