"""Other libraries' progress bars and notices, which would tear up our own output."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Switch off the progress bars of datasets and transformers; their warnings stay.

    DeepSpeed, which transformers imports where it is installed, is told about a machine without
    CUDA, so that it neither searches nor prints.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Read when datasets is imported, which only some data needs.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
