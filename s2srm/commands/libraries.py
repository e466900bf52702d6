"""Messages: ours on stderr, and no progress bars of other libraries, which would tear them up."""

from __future__ import annotations

import logging
import os


def set_up_logging() -> None:
    """Messages of s2srm on stderr: INFO on rank 0, ERROR on the others."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    main_rank = os.environ.get("RANK", "0") == "0"
    logging.getLogger("s2srm").setLevel(logging.INFO if main_rank else logging.ERROR)


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
