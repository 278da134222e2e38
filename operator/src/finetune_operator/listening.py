"""Where the operator's servers listen: one port of every address, IPv4 and IPv6. Used by health.py and progress/."""

from __future__ import annotations

import socket
import ssl

from aiohttp import web


async def listen(runner: web.AppRunner, port: int, ssl_context: ssl.SSLContext | None = None) -> None:
    """Serve `runner`, which is set up, on `port`. OSError when the port is taken."""
    await web.SockSite(runner, open_socket(port), ssl_context=ssl_context).start()


def open_socket(port: int) -> socket.socket:
    """A listening socket on `port` of every address: both families where the machine has IPv6, else IPv4."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError:
            pass  # IPv6 is compiled in and switched off; or the port is taken, which the next line tells
    return socket.create_server(("0.0.0.0", port))  # noqa: S104  kubelet, Prometheus and stages come from outside
