"""The signals that ask a command to stop, each noted once, so that nothing is left half-written."""

from __future__ import annotations

import signal

# Ctrl-C, the system's request, and the end of the terminal, which Windows does not have.
STOPPING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def heeded() -> tuple[signal.Signals, ...]:
    """Those that end a process: not what its parent had ignored, as nohup does with the terminal's end."""
    return tuple(number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN)
