"""How one of several processes ends: its last word comes last, whatever its other threads print."""

import subprocess
import sys

import pytest

PROCESS = """
import os, sys, threading, time
from sharding import exit_now, fail
from sharding.process_end import report_sudden_end

class SlowToFlush:
    def write(self, text):
        pass

    def flush(self):
        time.sleep(0.3)

def talk():
    while True:
        os.write(2, b"from native code\\n")
        sys.stderr.write("from Python\\n")

report_sudden_end(0, 2)
sys.stdout = SlowToFlush()
threading.Thread(target=talk, daemon=True).start()
time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("end", "code", "word"),
    [
        ("fail(2, 'error: no space left')", 2, "error: no space left"),
        ("exit_now(3, 'error: nobody there')", 3, "error: nobody there"),
        ("os.abort()", -6, "error: process 0 of 2, on "),
    ],
)
def test_the_last_word_is_the_last_line(end, code, word):
    process = subprocess.run([sys.executable, "-c", PROCESS + end], stderr=subprocess.PIPE, text=True, timeout=60)
    assert process.returncode == code
    lines = process.stderr.splitlines()
    assert lines[-1].startswith(word) and sum(line.startswith("error: ") for line in lines) == 1
