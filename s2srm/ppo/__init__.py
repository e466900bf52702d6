"""Clipped PPO on token rewards: experience of a phase, then minibatch updates."""
