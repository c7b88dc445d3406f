"""Start-up paid once: a process that has imported everything forks for each notebook of a run of many.

`serving` starts it and names its socket in VITREG_FORKED. The Snakefile then starts `forked.py run ITEM …` in the place
of `vitreg run ITEM …`: it hands its arguments, environment and output over, and waits. The process forks a runner,
which forks the notebook's kernel before it starts a thread of its own. It forks only while one thread runs in it and no
GPU is in use; where that is not so, or it is gone, `vitreg run` is started the plain way. Tests that run notebooks by
nbval start `forked.py kernel -f CONNECTION_FILE` in the place of a kernel in the same way (notebooks/conftest.py).
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
FORK_SAFE = {"jemalloc_bg_thd"}  # pyarrow's allocator ends and restarts it at a fork by itself
PLAIN = ["-m", "vitreg_lib.cli"]
KERNEL = "kernel"  # the first argument of who asks for a kernel alone


@contextmanager
def serving(environment: dict):
    """Inside, there is a process to fork from, which imports when it is first asked; gives the environment to ask it.

    Only on Linux, for elsewhere libraries do not bear a fork, and without VITREG_PLAIN: else the environment stays.
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
    """Let the process run `vitreg ARGUMENTS`, or a kernel; its exit code. Does not return where it is run plainly."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner gets it too and says what is to be said
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.environ[VARIABLE])
            asked = {"arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd()}
            socket.send_fds(connection, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
            answer = connection.makefile()
            if answer.readline():  # it has forked
                return int(answer.readline() or 128 + signal.SIGKILL)
    except OSError:
        pass
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plain = ["-m", "ipykernel_launcher", *arguments[1:]] if arguments[0] == KERNEL else [*PLAIN, *arguments]
    os.execv(sys.executable, [sys.executable, *plain])


def serve(listener: socket.socket) -> None:
    """Fork for each who asks, until stdin is closed."""
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
    """Whether nothing in this process is lost by a fork: no thread but this one, no GPU in use."""
    names = {open(f"/proc/self/task/{number}/comm").read().strip() for number in os.listdir("/proc/self/task")[1:]}
    return names <= FORK_SAFE and not sys.modules["torch"].cuda.is_initialized()


def _import_all() -> None:
    import gc
    import importlib

    # as ipykernel does before matplotlib is imported. What loads the backend, as our plots do, waits for the kernel.
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    sys.path.append(os.path.dirname(__file__))
    for name in (*PACKAGES, "vitreg_lib.cli", "execute"):
        importlib.import_module(name)
    sys.path.pop()  # kernels do not have it
    sys.modules["vitreg_lib.record.run"].items()  # what is read once in a process, and takes a while
    sys.modules["vitreg_lib.model.names"].entries()
    gc.freeze()  # else each fork's collections walk through, and so copy, all that was imported


def _run(connection: socket.socket) -> int:
    """In the fork: be `vitreg run`, or a kernel, and tell the exit code; end when the one who asked has ended."""
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

    def end_with_the_other():
        if not connection.recv(1):
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end_with_the_other, daemon=True).start()
    if only_kernel:
        code = _be_kernel(asked["arguments"], asked["environment"], asked["cwd"])
    else:
        code = sys.modules["vitreg_lib.cli"].main(asked["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"{code}\n".encode())
    return code


def _become(environment: dict, folder: str) -> None:
    """Give this fork an environment, a folder, random numbers and signals of its own."""
    import numpy

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    numpy.random.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _fork_kernel(connection: socket.socket) -> None:
    """Fork the kernel, which waits for what the first start of a kernel in this process will hand to it."""
    from jupyter_client.provisioning import local_provisioner

    plain = local_provisioner.launch_kernel
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        connection.close()
        os.setpgid(0, 0)
        os.close(writes)
        if handed := open(reads).read():  # else the runner has ended without one
            _be_kernel(*json.loads(handed))
        os._exit(0)
    os.close(reads)
    os.setpgid(process, process)  # here too: whoever is first, signals to the kernel's group never reach this one

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
    sys.modules["pandas"].set_option("display.max_columns", 20)  # as in a kernel; without one it was set for a terminal
    sys.path.insert(0, "")  # the notebook's folder
    # a kernel without a parent tells how to connect to it; with one it ends after it
    parent = f"--IPKernelApp.parent_handle={os.getppid()}"
    sys.argv = ["ipykernel_launcher", parent, *command[command.index("-f") :]]
    kernelapp.launch_new_instance()
    return 0


class Forked:
    """What jupyter_client asks of the process of a kernel, of a forked one."""

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
