"""Our line of error under torchrun: in its report, and once more as the last line on the screen.

torchrun answers a failed rank with a page of its own, which ends after ours. A rank can only speak
after it has ended, so a small process waits for that. Run as a script, this file is that process.
Left out: systems without pidfd (only Linux has it), where the line is in the report only.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time

_WAIT_SECONDS = 60.0


def is_launched() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leave_last_word(line: str) -> None:
    """Hand the line to torchrun, and have it printed on standard error when torchrun is done."""
    report(line)
    if hasattr(os, "pidfd_open"):
        command = [sys.executable, "-I", "-S", __file__, str(os.getppid()), line]
        # A session of its own: torchrun ends the sessions of its ranks.
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def report(line: str) -> None:
    """Hand the line to torchrun, for its own report of this rank's end."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with open(file, "w", encoding="utf-8") as target:
            json.dump({"message": {"message": line, "extraInfo": extra}}, target)


def wait_for(pid: int) -> None:
    """Wait for a process that is not ours to end, but not for ever."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:  # It has ended already.
        return
    select.select([descriptor], [], [], _WAIT_SECONDS)


if __name__ == "__main__":
    wait_for(int(sys.argv[1]))
    print(sys.argv[2], file=sys.stderr, flush=True)
