"""What a rank prints before it aborts the job reaches the launcher."""

import os
import threading
import time

from commhooks.transports.mpi import wait_until_read


def test_it_waits_until_the_pipe_is_read():
    read, write = os.pipe()
    stream = open(write, "w")
    stream.write("x" * 1000)
    seen = []

    def reader():
        time.sleep(0.2)
        seen.append(os.read(read, 4096))

    thread = threading.Thread(target=reader)
    thread.start()
    wait_until_read(stream, 30.0)
    assert seen == [b"x" * 1000]
    thread.join()
    stream.close()
    wait_until_read(stream, 30.0)  # a closed stream is left alone
    os.close(read)


def test_it_gives_up_and_leaves_files_alone(tmp_path):
    read, write = os.pipe()
    with open(write, "w") as stream:
        stream.write("nobody reads")
        wait_until_read(stream, 0.1)
        assert os.read(read, 100) == b"nobody reads"
    os.close(read)
    with (tmp_path / "log").open("w") as file:
        file.write("x")
        wait_until_read(file, 30.0)
