"""Runs one command and writes what it cost: `python -I -S launch.py RESULT TIMEOUT COMMAND…`, standard library only.

A program's peak memory, as the kernel reports it, includes that of the process it was started from. This one is
small, so that it never counts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

INTERVAL = 0.05  # seconds between looks at the command's private memory


def anonymous(pid: int) -> int:
    """Bytes of memory that is the process's own, without mapped files; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"RssAnon:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def main() -> None:
    result, timeout, command = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    peak, ended, timed_out = 0, threading.Event(), False

    def watch(pid: int, deadline: float) -> None:
        nonlocal peak, timed_out
        while not ended.wait(INTERVAL):
            peak = max(peak, anonymous(pid))
            if time.perf_counter() > deadline and not timed_out:
                timed_out = True
                os.kill(pid, signal.SIGKILL)

    begin = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    watcher = threading.Thread(target=watch, args=(pid, begin + timeout))
    watcher.start()
    # Not reaped yet: its I/O counters can still be read.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    wall = time.perf_counter() - begin
    ended.set()
    watcher.join()
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            io = {key: int(value) for key, value in (line.split(": ") for line in file)}
    except OSError:
        io = {}
    _, status, usage = os.wait4(pid, 0)
    cost = {
        "status": os.waitstatus_to_exitcode(status),
        "timed_out": timed_out,
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "system_s": usage.ru_stime,
        "peak_bytes": usage.ru_maxrss << 10,
        "private_bytes": peak,
        "read_bytes": io.get("rchar", 0),
        "written_bytes": io.get("wchar", 0),
        "disk_read_bytes": io.get("read_bytes", 0),
        "disk_written_bytes": io.get("write_bytes", 0),
    }
    with open(result, "w", encoding="ascii") as file:
        json.dump(cost, file)


if __name__ == "__main__":
    main()
