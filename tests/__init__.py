"""Tests; a folder with helpers of its own is a package, whose helpers are imported by name."""
