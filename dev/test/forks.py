"""Runs Python programs as their command lines do. Each runs in a process forked from one that has imported their packages:
hundreds of short runs would spend most of their time on imports.

forks.py PACKAGE...: such a process. It reads command lines and writes results, each a line of JSON."""

import importlib
import json
import os
import queue
import runpy
import signal
import subprocess
import sys
import tempfile

TIME_LIMIT = 300  # seconds


class Forks:
    """A process for each core; several threads may call run().

    Args:
        packages: that the programs import.
    """

    def __init__(self, *packages):
        self.idle = queue.Queue()
        for _ in range(os.cpu_count()):
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.idle.put(subprocess.Popen([sys.executable, __file__, *packages], **pipes))

    def run(self, *command):
        """Runs a program, as subprocess.run with capture_output."""
        process = self.idle.get()
        process.stdin.write(json.dumps([*map(str, command)]) + "\n")
        process.stdin.flush()
        result = json.loads(process.stdout.readline())
        self.idle.put(process)
        return subprocess.CompletedProcess(command, *result)


def fork(command):
    """Returns None in the new process, and [exit code, stdout, stderr] when it has ended."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            signal.alarm(TIME_LIMIT)
            for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno())):
                os.dup2(file, number)
            sys.argv, sys.path[0] = command, os.path.dirname(command[0])
            return None
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return [code, *texts]


if __name__ == "__main__":
    for package in sys.argv[1:]:
        importlib.import_module(package)
    for line in sys.stdin:
        result = fork(json.loads(line))
        if not result:
            runpy.run_path(sys.argv[0], run_name="__main__")
            break
        print(json.dumps(result), flush=True)
