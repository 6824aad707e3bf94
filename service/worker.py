"""python -m service.worker: one of the processes that serve, started and watched by the supervisor."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from service.handover import Handover
    from service.runtime import Runtime
    from service.settings import Settings

REPORT_SECONDS = 0.5  # how often the supervisor hears that nothing has changed
RETRY_SECONDS = 0.1
LISTENERS = 16  # on one port: a turn of the event loop takes one connection from each, and probes wait in the same line
REASON_CHARACTERS = 2_000  # of why it could not start: a line that the supervisor reads has an end
PR_SET_PDEATHSIG = 1  # of Linux' prctl
ORPHAN_SECONDS = 5.0  # after the drain, for a process whose supervisor is gone, before it is ended the hard way


class Link:
    """The line to the supervisor. It closes when either end dies."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._reported: tuple[str, float] = ("", 0.0)
        self.cut = threading.Event()

    def report(self, phase: str) -> None:
        """Say the phase, at once when it has changed; the supervisor takes silence for a stand-still."""
        before, told = self._reported
        now = time.monotonic()
        if phase != before or now - told >= REPORT_SECONDS:
            self._reported = phase, now
            self.say(phase)

    def say(self, line: str) -> None:
        """Send one line; a supervisor that does not read, or is gone, must not hold us up."""
        with suppress(OSError):
            self._line.send(line.encode() + b"\n", socket.MSG_DONTWAIT)

    def follow(self, orders: dict[str, Callable[[], None]]) -> None:
        """Do what the supervisor says until it is gone; blocks, so it is for a thread."""
        with self._line.makefile("r") as lines, suppress(OSError):
            for line in lines:
                orders[line.strip()]()
        self.cut.set()


def main() -> int:
    """Serve until told to stop; the answer is the process's exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_once)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the supervisor's to pass on, also when a terminal sends it to all
    _go_on_when_supervisor_dies()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process has a core: no thread for each core in each
    slot, port, line, order = sys.argv[1:]
    link = Link(socket.socket(fileno=int(line)))

    from service.errors import StartError
    from service.logs import configure_logs
    from service.metrics import share_metrics
    from service.settings import load_settings

    share_metrics(slot)
    try:
        settings = load_settings()
        configure_logs(settings.log_level)
        return serve(settings, int(port), int(slot), link, late=order == "late")
    except StartError as error:
        link.say(f"failed {json.dumps(str(error)[:REASON_CHARACTERS])}")
        return 1


def serve(settings: Settings, port: int, slot: int, link: Link, *, late: bool) -> int:
    """Serve until a signal, the supervisor's end, or that of the engines; raises StartError when that cannot be.

    The first processes listen at once and say that they are starting. One that comes `late`, in the place of another,
    first loads its models, so that no client meets a 503 while the other processes are ready.
    """
    from service.app import create_app
    from service.metrics import DIRECTORY
    from service.server import Server
    from service.sockets import listen

    app = create_app(settings, on_reload=lambda: link.say("reloaded"))
    runtime: Runtime = app.state.runtime
    runtime.others_ready = late
    threading.Thread(target=_obey, args=(link, runtime), name="link", daemon=True).start()
    if late:
        runtime.start()
        runtime.wait_loaded()
    if runtime.failure is None:
        with ExitStack() as open_sockets:
            listeners = [open_sockets.enter_context(listen(settings.host, port)) for _ in range(LISTENERS)]
            Server(app, link.report, _join(settings, slot)).run(listeners)
    if runtime.failure is not None:
        raise runtime.failure
    if link.cut.is_set():
        shutil.rmtree(os.environ[DIRECTORY], ignore_errors=True)  # nobody else is left to do it
    return int(runtime.gave_up)


def _join(settings: Settings, slot: int) -> Handover | None:
    """The processes that even out their connections; without them they are spread as the kernel does it."""
    import structlog

    from service.handover import Handover
    from service.metrics import DIRECTORY

    if settings.processes == 1:
        return None
    try:
        return Handover(Path(os.environ[DIRECTORY]), slot, settings.processes)
    except OSError as error:
        structlog.get_logger().warning("connections are not evened out", reason=str(error))
        return None


def _obey(link: Link, runtime: Runtime) -> None:
    reload_wanted = threading.Event()
    threading.Thread(target=_reload_when_told, args=(runtime, reload_wanted), name="reload", daemon=True).start()

    def all_ready() -> None:
        runtime.others_ready = True

    link.follow({"all ready": all_ready, "reload": reload_wanted.set, "drain": runtime.drain})
    runtime.leave_port()
    os.kill(os.getpid(), signal.SIGTERM)  # for when there is no server yet
    time.sleep(runtime.settings.drain_seconds + ORPHAN_SECONDS)
    _exit(1)


def _reload_when_told(runtime: Runtime, wanted: threading.Event) -> None:
    import structlog

    from service.errors import RefrainError, Starting

    while wanted.wait():
        wanted.clear()
        try:
            runtime.reload()
        except Starting:
            wanted.set()
            time.sleep(RETRY_SECONDS)
        except RefrainError:
            pass  # said in the log; when draining, of no use any more
        except Exception:  # noqa: BLE001  # a bug that met one reload must not keep the next from being tried
            structlog.get_logger().exception("a reload met a bug")


def _go_on_when_supervisor_dies() -> None:
    """Have the kernel continue this process then: stopped, it would hold the port for good, with nobody to end it.

    SIGCONT, since one that runs does not even notice, and answers what it has accepted. The kernel goes by the thread
    that started this process: the supervisor's main one, which lives as long as the supervisor.
    """
    with suppress(AttributeError):  # not every system has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGCONT))


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End this process, which does not serve yet, at a signal.

    An exception would not do: where it is raised in a destructor or a callback it is dropped, and with it the stop.
    """
    os._exit(0)


def _exit(status: int) -> NoReturn:
    """Past the interpreter's own end, which an engine that hangs could hold up."""
    from service.logs import drain_logs

    drain_logs()
    os._exit(status)


if __name__ == "__main__":
    _exit(main())
