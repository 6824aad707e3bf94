"""A server with nothing to do: what a probe of it takes is the machine's own time, which no service can go below.

Says its port, and answers until its input ends.
"""

import os
import socket
import sys
from contextlib import suppress
from threading import Thread

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def _answer_all(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # who leaves before its answer must not end it for the others
            connection.recv(4096)
            connection.sendall(_ANSWER)


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=_answer_all, args=(listener,), daemon=True).start()
        os.write(sys.stdout.fileno(), f"{listener.getsockname()[1]}\n".encode())
        sys.stdin.read()
