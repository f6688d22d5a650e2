"""One host's part of `Network.transfer`: sends to its right neighbour while it receives from its left one.

Run inside a namespace: `network_transfer.py ADDRESS BYTES TIMEOUT_S`; prints the seconds from the start
of sending (its time is the first 8 bytes, for namespaces of one machine share the clock) to the last byte's arrival. The
receiver's own start would not do: on a busy machine much has arrived before it first runs.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

PORT = 29777
_CHUNK = 1 << 18


def main(address: str, payload: int, timeout_s: float) -> None:
    """Serves and sends once; exits with a traceback when a peer does not come in time."""
    socket.setdefaulttimeout(timeout_s)
    with socket.create_server(("", PORT), backlog=8) as server:
        sender = threading.Thread(target=_send, args=(address, payload, timeout_s), daemon=True)
        sender.start()
        connection, _ = server.accept()
        with connection:
            seconds = _receive(connection, payload)
        sender.join(timeout_s)
    print(f"{seconds:.6f}")


def _receive(connection: socket.socket, payload: int) -> float:
    header = b""
    while len(header) < 8:
        header += connection.recv(8 - len(header)) or _gone(len(header), payload)
    got = 8
    while got < payload:
        got += len(connection.recv(_CHUNK) or _gone(got, payload))
    return (time.monotonic_ns() - int.from_bytes(header, "little")) * 1e-9


def _gone(got: int, payload: int) -> bytes:
    raise ConnectionError(f"the neighbour left after {got} of {payload} bytes")


def _send(address: str, payload: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection((address, PORT), timeout=timeout_s)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    block = bytes(_CHUNK)
    with connection:
        connection.sendall(time.monotonic_ns().to_bytes(8, "little"))
        left = payload - 8
        while left:
            left -= connection.send(block[: min(left, _CHUNK)])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
