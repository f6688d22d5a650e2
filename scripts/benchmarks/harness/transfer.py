"""One host's part of `limits.transfer`: sends to some hosts while it receives from others.

Run inside a namespace: `python -m benchmarks.harness.transfer INCOMING BYTES TIMEOUT_S [ADDRESS ...]` takes
in INCOMING connections and sends BYTES to every address. It prints a line for each connection that came in:
the sender's address, when it began to send and when the last byte was there, in seconds. The beginning is the
sender's own time, which travels in the first 8 bytes: namespaces of one machine share the clock, and on a
busy machine much has arrived before the receiver first runs. A sender waits until its receiver has all its
connections, so that flows into one host run at the same time.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

PORT = 29777
_CHUNK = 1 << 18
_GO = b"!"


def main(incoming: int, payload: int, timeout_s: float, addresses: Sequence[str]) -> None:
    """Serves and sends once; exits with a traceback when a peer does not come in time."""
    socket.setdefaulttimeout(timeout_s)
    with (
        socket.create_server(("", PORT), backlog=8) as server,
        ThreadPoolExecutor(incoming + len(addresses)) as pool,
    ):
        sending = [pool.submit(_send, address, payload, timeout_s) for address in addresses]
        accepted = [server.accept() for _ in range(incoming)]
        for connection, _ in accepted:
            connection.sendall(_GO)
        receiving = [pool.submit(_receive, connection, payload) for connection, _ in accepted]
        for (_, (address, _)), received in zip(accepted, receiving, strict=True):
            print(address, *(f"{seconds:.6f}" for seconds in received.result()))
        for sent in sending:
            sent.result()


def _receive(connection: socket.socket, payload: int) -> tuple[float, float]:
    """When the sender began and when the last byte was here, seconds of the machine's monotonic clock."""
    with connection:
        header = b""
        while len(header) < 8:
            header += connection.recv(8 - len(header)) or _gone(len(header), payload)
        got = 8
        while got < payload:
            got += len(connection.recv(_CHUNK) or _gone(got, payload))
        return int.from_bytes(header, "little") * 1e-9, time.monotonic_ns() * 1e-9


def _gone(got: int, payload: int) -> bytes:
    raise ConnectionError(f"the sender left after {got} of {payload} bytes")


def _send(address: str, payload: int, timeout_s: float) -> None:
    block = bytes(_CHUNK)
    with _connected(address, timeout_s) as connection:
        if connection.recv(1) != _GO:
            raise ConnectionError(f"{address} left before it was sent anything")
        connection.sendall(time.monotonic_ns().to_bytes(8, "little"))
        left = payload - 8
        while left:
            left -= connection.send(block[: min(left, _CHUNK)])


def _connected(address: str, timeout_s: float) -> socket.socket:
    """Tries until the other host's program has started."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((address, PORT), timeout=timeout_s)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
