"""Comparing policies: what they answer, how it is judged, with confidence intervals."""
