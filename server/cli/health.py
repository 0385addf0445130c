"""`python -m server.cli.health`: whether the server on this machine is alive, for the health check of a container.

It asks the port that a `peregrine serve` of the same user really listens at, whatever flags and files said.
"""

from __future__ import annotations

import argparse
import http.client
import sys
from collections.abc import Iterator

import psutil

SECONDS = 4.0  # below the time-out of the container's check


def main(arguments: list[str] | None = None) -> int:
    """0: it is; 1: it is not, or there is none."""
    parser = argparse.ArgumentParser(prog="python -m server.cli.health", description=__doc__)
    parser.add_argument("--ready", action="store_true", help="ask whether it takes requests, not whether it lives")
    parser.add_argument("--process", type=int, metavar="ID", help="ask this one, where there may be others")
    options = parser.parse_args(arguments)
    path = "/readyz" if options.ready else "/livez"
    for address, port in listening(options.process):
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            print(f"{host} port {port}: {answer.status} {answer.read(4096).decode(errors='replace')}")
            return int(answer.status != 200)
        except OSError as error:
            print(f"{host} port {port}: {error}", file=sys.stderr)
            return 1
        finally:
            connection.close()
    print("no server listens here", file=sys.stderr)
    return 1


def listening(pid: int | None) -> Iterator[tuple[str, int]]:
    """(address, port) of the servers of this user, or of one of them alone."""
    for process in psutil.process_iter(["cmdline"]):
        if pid not in (None, process.pid):
            continue
        command = process.info["cmdline"] or []
        if "serve" not in command[1:4] or not any("peregrine" in part or "server.cli" in part for part in command[:3]):
            continue
        try:
            connections = process.net_connections("inet")
        except psutil.Error:  # another user's, or it has ended
            continue
        yield from ((c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN)


if __name__ == "__main__":
    sys.exit(main())
