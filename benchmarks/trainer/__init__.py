"""Programs of the trainer's part of `make gpu`; each can be run by itself, on a CPU too."""
