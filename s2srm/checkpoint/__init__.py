"""Checkpoints: a run that was killed goes on, to the bit.

files and agreement know no torch; start decides where a run begins; saver writes and restores.
"""
