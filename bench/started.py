"""Starts one command from a process that is small, and leaves its peak memory in a file.

python bench/started.py FILE COMMAND...        FILE: kB of its largest process, as wait4 counts it

wait4 begins its count of a child with what the parent has held so far. A bench has held a training; this holds nothing.
"""

import os
import subprocess
import sys

if __name__ == "__main__":
    _, status, usage = os.wait4(subprocess.Popen(sys.argv[2:]).pid, 0)
    with open(sys.argv[1], "w") as file:
        file.write(str(usage.ru_maxrss))
    sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
