"""No server at all: one process that decodes and classifies the same pictures in a loop.

    python -m benchmarks.peers.bare_loop MODEL SECONDS PICTURE...

It says `ready`, waits for a line, loops, and prints how long each turn took, in seconds.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from benchmarks.classifier import Classifier, prepare
from benchmarks.load import Tally


def main() -> None:
    model, seconds, *paths = sys.argv[1:]
    classify = Classifier(Path(model), threads=1)
    pictures = itertools.cycle([Path(path).read_bytes() for path in paths])
    classify([prepare(next(pictures))])
    print("ready", flush=True)
    sys.stdin.readline()
    tally, more = Tally(0.0, float(seconds)), True
    while more:
        began_s = time.perf_counter()
        classify([prepare(next(pictures))])
        more = tally.add(began_s, time.perf_counter())
    print(json.dumps(tally.latencies))


if __name__ == "__main__":
    main()
