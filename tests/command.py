"""Commands in processes that are forked from one which has imported the training modules already.

`run_command` replaces `subprocess.run([sys.executable, "-m", "searche1_lite", ...])`: a process with its own working
directory, environment and pipes, without the seconds that importing PyTorch and TRL takes. The server only imports: it
starts no Java, makes no tensors and has no threads.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "PYTORCH", "OMP_", "CUDA", "PYTHON", "TRL_", "HUGGING", "TMPDIR")
"""Beginnings of environment variables that libraries read when they are imported."""


def run_command(
    *words: str, cwd: Path | str | None = None, text: bool = True, given: bytes = b"", **environment: str
) -> "subprocess.CompletedProcess[Any]":
    """The command's captured output; `given` is its standard input."""
    merged = os.environ | environment
    if _Server.differs(merged):
        command = [sys.executable, "-m", "searche1_lite", *words]
        data = given.decode() if text else given
        return subprocess.run(command, cwd=cwd, capture_output=True, text=text, input=data, env=merged)
    pipes = [os.pipe(), os.pipe()]
    with tempfile.TemporaryFile() as stdin, socket.socket(socket.AF_UNIX) as connection:
        stdin.write(given)
        stdin.seek(0)
        connection.connect(_Server.address())
        request = {"words": words, "cwd": str(Path(cwd or ".").absolute()), "environment": merged}
        socket.send_fds(connection, [b"r"], [stdin.fileno(), pipes[0][1], pipes[1][1]])
        connection.sendall(json.dumps(request).encode() + b"\n")
        outputs: list[bytes] = [b"", b""]
        for _, end in pipes:
            os.close(end)

        def read(index: int) -> None:
            with os.fdopen(pipes[index][0], "rb") as pipe:
                outputs[index] = pipe.read()

        readers = [threading.Thread(target=read, args=(index,)) for index in range(2)]
        for reader in readers:
            reader.start()
        status = int(connection.makefile().readline())
        for reader in readers:
            reader.join()
    shown = [output.decode() if text else output for output in outputs]
    return subprocess.CompletedProcess(["searche1-lite", *words], os.waitstatus_to_exitcode(status), *shown)


class _Server:
    """The process that is forked, started when a test first needs it."""

    folder: "tempfile.TemporaryDirectory[str] | None" = None
    environment: dict[str, str]

    @classmethod
    def address(cls) -> str:
        if cls.folder is None:
            cls.folder = tempfile.TemporaryDirectory()
            cls.environment = dict(os.environ)
            path = f"{cls.folder.name}/socket"
            process = subprocess.Popen([sys.executable, __file__, path], stdout=subprocess.PIPE)
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            atexit.register(process.kill)
        return f"{cls.folder.name}/socket"

    @classmethod
    def differs(cls, environment: dict[str, str]) -> bool:
        cls.address()
        names = {name for name in (*environment, *cls.environment) if name.startswith(READ_AT_IMPORT)}
        return any(environment.get(name) != cls.environment.get(name) for name in names)


def serve(path: str) -> None:
    import searche1_lite.bench.doctor
    import searche1_lite.cli.main
    import searche1_lite.evaluate.run
    import searche1_lite.serve.export
    import searche1_lite.train.rounds  # noqa: F401

    running: dict[int, socket.socket] = {}
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listening, ended], [], [])
            if ended in ready:
                os.read(ended, 4096)
                while running and (found := os.waitpid(-1, os.WNOHANG))[0]:
                    with running.pop(found[0]) as connection:
                        connection.sendall(f"{found[1]}\n".encode())
            if listening in ready:
                connection, _ = listening.accept()
                _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
                request = json.loads(connection.makefile().readline())
                if pid := os.fork():
                    running[pid] = connection
                    for descriptor in descriptors:
                        os.close(descriptor)
                else:
                    become(request, descriptors)


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """This forked process is the command from here on."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        os.closerange(3, 256)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(target, "w", closefd=False) for target in (1, 2))
        sys.argv = ["searche1-lite", *request["words"]]
        from searche1_lite.cli.main import main

        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        atexit._run_exitfuncs()
    except BaseException:  # as the interpreter does for an error that nobody handles
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
