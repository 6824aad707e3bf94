"""The port: held by the supervisor as long as it lives, and listened on by each of its processes."""

from __future__ import annotations

import socket

from service.errors import StartError


def reserve(host: str, port: int) -> socket.socket:
    """Take a port for `listen` to share, without listening; raises StartError when the address is wrong or taken."""
    holder = socket.socket(_family(host))
    try:
        # Connections of an earlier service that still wind down are no obstacle; whoever listens or holds is one.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if holder.family == socket.AF_INET6:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as `listen` has it
        holder.bind((host, port))
    except OSError as error:
        holder.close()
        raise _refused(host, port, str(error.strerror)) from None
    except TypeError:  # "encoding of hostname failed"
        holder.close()
        raise _refused(host, port, "a host's name has parts of 1 to 63 characters") from None
    # Only now: a port that is bound so from the start could be shared with another service, silently.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return holder


def listen(host: str, port: int) -> socket.socket:
    """Listen on the port, perhaps beside other processes: the kernel spreads the connections over them."""
    try:
        return socket.create_server((host, port), family=_family(host), reuse_port=True)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address, which is said already
        raise _refused(host, port, reason) from None


def _refused(host: str, port: int, reason: str) -> StartError:
    return StartError(f"REFRAIN_HOST, REFRAIN_PORT: cannot listen on {host}:{port}: {reason}")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
