"""A stand-in for `Network` on machines that cannot make one, and where none is needed."""


class NoNetwork:
    """Hosts and a rate, nothing else."""

    def __init__(self, hosts, rate_mbit):
        self.hosts, self.rate_mbit = hosts, rate_mbit

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set_rate(self, rate_mbit, burst_bytes=None):
        self.rate_mbit = rate_mbit
