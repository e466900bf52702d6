"""How a process ends: with its own exit code, and without the interpreter's finalisation.

A finished rank could die at exit with "terminate called without an active exception"
(pytorch#190489). Gloo's worker threads drop a collective's tensors after the collective has
returned, and take the GIL for it; Python before 3.14 ends a thread that asks for the GIL while the
interpreter is being finalised, and unwinding through C++ that may not throw aborts the process.

`destroy_process_group` joins these threads only where nobody else holds the group. DeepSpeed's
engines under ZeRO-3 hold it and are never freed; after an error a worker may also be waiting for a
rank that will not come. So nothing here waits for the threads: the process ends before Python would
end them.

Left out: programs of one's own that call a stage's `run`; they end as they like, or with
`run_and_exit`.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def run_and_exit(main: Callable[[], int | None]) -> NoReturn:
    """Run `main`, then all that Python does at exit but for the finalisation, and end the process.

    The exit code is what `main` returns (None is 0), or SystemExit's, or 1 after a traceback.
    """
    try:
        code = main()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    # In the order of Py_FinalizeEx: threads, exit handlers, streams.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
