"""Runs the command line in forked children of one interpreter that has everything imported and the shim loaded.

Reads one JSON request a line and answers with one: what the child was told, how it ended, what it said. Started by
`harness.Server`; an interpreter per case would take ten times as long.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import tempfile
from typing import Any, NoReturn

import safepatch_core.merging.verification
from safepatch_core.backends import cpu, reference
from safepatch_core.commands import apply, cli, log, revert
from safepatch_core.files import direct, disk
from safepatch_core.fixes import apply as fixes_apply
from safepatch_core.fixes import log as fixes_log
from safepatch_core.merging import api, sink
from tests.chunked import cut_into

WARM = (api, cpu, reference, safepatch_core.merging.verification, apply, log, revert, fixes_apply, fixes_log)
shim = ctypes.CDLL(None)


def child(request: dict[str, Any], output: int, log: int) -> NoReturn:
    """Run one command as the program would; never returns."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["cwd"])
    if request["chunk"] is not None:
        cut_into(request["chunk"])
    if request["mark_bytes"] is not None:
        sink.MARK_BYTES = request["mark_bytes"]
    if request["past_cache"]:
        disk.DIRECT_BYTES = direct.DIRECT_READ = 0
        direct.cached = lambda fd, at, nbytes: 0
    sys.argv = ["safepatch", *request["args"]]
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    fault = request["fault"]
    if fault is not None:
        where = ctypes.c_char_p(os.fsencode(fault["dir"]))
        shim.fault_arm(where, ctypes.c_long(fault["at"]), fault["how"], int(fault["stays"]), log)
    status = 70
    try:
        cli.main()
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            child(request, output.fileno(), log.fileno() if request["fault"] else -1)
        watch = os.pidfd_open(pid)
        try:
            if request["signal"] is not None:
                number, after = request["signal"]
                if not select.select([watch], [], [], after)[0]:
                    os.kill(pid, number)
            hung = not select.select([watch], [], [], request["timeout"])[0]
            if hung:
                os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
        finally:
            os.close(watch)
        output.seek(0)
        log.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "hung": hung,
            "text": output.read().decode(errors="replace"),
            "calls": log.read().decode(errors="replace").splitlines(),
            "peak": usage.ru_maxrss << 10,
        }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
