"""A server of the program under test, for the checks beside this file."""

import contextlib
import re
import subprocess
import sys
import threading


@contextlib.contextmanager
def served(program, config):
    """Serves a serve.toml. Gives the address and the process, which has its exit code afterwards."""
    process = subprocess.Popen([program, "serve", "-c", config], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"serving on (http://[\d.:]+)", line):
                break
        else:
            sys.exit("the server ended")
        # A full pipe would hold it up.
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        yield found[1], process
    finally:
        process.terminate()
        process.wait()
