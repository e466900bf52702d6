"""Other libraries' progress bars and notices, which would tear up our own output."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Switch off the progress bars of datasets and transformers; their warnings stay."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
