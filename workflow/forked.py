"""Faster start of many notebooks: a server process imports all libraries once and forks for each notebook.

`serving` starts the server and puts the path of its socket into VITREG_FORKED. The Snakefile then runs `forked.py run
ITEM …` instead of `vitreg run ITEM …`. This client passes its arguments, environment and output to the server and
waits. The server forks a runner. The runner forks the notebook's kernel before it starts any thread. The server forks
only if it has a single thread and uses no GPU; otherwise, or if the server has ended, the client starts `vitreg run` in
the normal way. In the same way, tests that run notebooks by nbval start `forked.py kernel -f CONNECTION_FILE` instead
of a kernel (notebooks/conftest.py).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress

VARIABLE = "VITREG_FORKED"
PACKAGES = "timm sklearn.linear_model skimage seaborn datasets papermill ipykernel.kernelapp ipykernel.ipkernel".split()
FORK_SAFE = {"jemalloc_bg_thd"}  # pyarrow's allocator stops and restarts this thread at a fork
PLAIN = ["-m", "vitreg_lib.cli"]
KERNEL = "kernel"  # the first argument of a client that needs only a kernel


@contextmanager
def serving(environment: dict):
    """A context with a running server; yields the environment for clients. The server imports at the first request.

    Only on Linux, because on other systems the libraries do not survive a fork, and only without VITREG_PLAIN.
    Otherwise there is no server and the environment is unchanged.
    """
    if sys.platform != "linux" or environment.get("VITREG_PLAIN"):
        yield environment
        return
    from execute import kernel_folder

    with kernel_folder() as place:
        environment = environment | {VARIABLE: f"{place}/fork", "OMP_NUM_THREADS": "1"}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(environment[VARIABLE])
            listener.listen(64)
            command = [sys.executable, "-P", __file__, "serve", str(listener.fileno())]
            server = subprocess.Popen(
                command, env=environment, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        try:
            yield environment
        finally:
            server.stdin.close()
            server.wait()


def ask(arguments: list[str]) -> int:
    """The exit code of `vitreg ARGUMENTS`, or of a kernel, run by the server. Without it, replaces this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner also gets it and prints the message
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.environ[VARIABLE])
            asked = {"arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd()}
            socket.send_fds(connection, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
            answer = connection.makefile()
            if answer.readline():  # the server has forked
                return int(answer.readline() or 128 + signal.SIGKILL)
    except OSError:
        pass
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plain = ["-m", "ipykernel_launcher", *arguments[1:]] if arguments[0] == KERNEL else [*PLAIN, *arguments]
    os.execv(sys.executable, [sys.executable, *plain])


def serve(listener: socket.socket) -> None:
    """Fork for each client, until stdin is closed."""
    import select

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _forget_ended)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        _import_all()
        if not may_fork():
            return
        if os.fork() == 0:
            listener.close()
            os._exit(_run(connection))
        connection.close()


def _forget_ended(number, frame) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def may_fork() -> bool:
    """Whether a fork is safe: this process has no other thread and uses no GPU."""
    names = {open(f"/proc/self/task/{number}/comm").read().strip() for number in os.listdir("/proc/self/task")[1:]}
    return names <= FORK_SAFE and not sys.modules["torch"].cuda.is_initialized()


def _import_all() -> None:
    import gc
    import importlib

    # as ipykernel does before matplotlib is imported; our plots, which load the backend, are imported in the kernel
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    sys.path.append(os.path.dirname(__file__))
    for name in (*PACKAGES, "vitreg_lib.cli", "execute"):
        importlib.import_module(name)
    sys.path.pop()  # kernels do not have this folder
    sys.modules["vitreg_lib.record.run"].items()  # yaml files that are slow to read and cached in the process
    sys.modules["vitreg_lib.model.names"].entries()
    gc.freeze()  # else garbage collection in a fork visits all imported objects and so copies their memory


def _run(connection: socket.socket) -> int:
    """In the fork: run `vitreg run`, or a kernel, and send the exit code; end when the client has ended."""
    import threading

    text, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    asked = json.loads(text)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    only_kernel = asked["arguments"][0] == KERNEL
    _become(asked["environment"], asked["cwd"])
    if not only_kernel:
        _fork_kernel(connection)
    connection.sendall(b"forked\n")

    def end_with_the_client():
        if not connection.recv(1):
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end_with_the_client, daemon=True).start()
    if only_kernel:
        code = _be_kernel(asked["arguments"], asked["environment"], asked["cwd"])
    else:
        code = sys.modules["vitreg_lib.cli"].main(asked["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"{code}\n".encode())
    return code


def _become(environment: dict, folder: str) -> None:
    """Set this fork's environment and working folder, a new random state, and default signal handlers."""
    import numpy

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    numpy.random.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _fork_kernel(connection: socket.socket) -> None:
    """Fork the kernel; it waits until this process starts a kernel for the first time, and gets its arguments."""
    from jupyter_client.provisioning import local_provisioner

    plain = local_provisioner.launch_kernel
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        connection.close()
        os.setpgid(0, 0)
        os.close(writes)
        if handed := open(reads).read():  # else the runner has ended without starting a kernel
            _be_kernel(*json.loads(handed))
        os._exit(0)
    os.close(reads)
    os.setpgid(process, process)  # in both processes, whichever runs first: this one must not get the group's signals

    def launch(command, **options):
        local_provisioner.launch_kernel = plain
        with open(writes, "w") as pipe:
            json.dump([command, options.get("env") or dict(os.environ), options.get("cwd") or os.getcwd()], pipe)
        return Forked(process)

    local_provisioner.launch_kernel = launch


def _be_kernel(command: list[str], environment: dict, folder: str) -> int:
    from ipykernel import kernelapp

    _become(environment, folder)
    sys.modules["torch"].set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    sys.modules["pandas"].set_option("display.max_columns", 20)  # as in a kernel; the import set it for a terminal
    sys.path.insert(0, "")  # the notebook's folder
    # a kernel without a parent prints how to connect to it; with a parent it ends when the parent ends
    parent = f"--IPKernelApp.parent_handle={os.getppid()}"
    sys.argv = ["ipykernel_launcher", parent, *command[command.index("-f") :]]
    kernelapp.launch_new_instance()
    return 0


class Forked:
    """The interface of a process that jupyter_client expects, for a forked kernel."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """The exit code, when it has ended."""
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            process, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if process else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        sys.exit(ask(sys.argv[1:]))
