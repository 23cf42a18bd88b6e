"""Servers that flowlang is measured against, each a script that takes the same options.

`--job size` answers a body with its length, `--job classify` a picture with its best class. They
run in an environment without flowlang.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def options() -> argparse.Namespace:
    """The options of this process; what a server reads from the command line itself is let be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", choices=("size", "classify"), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", type=Path, help="of the job `classify`")
    parser.add_argument("--workers", type=int, default=1, help="processes that do the job")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime, in each worker")
    parser.add_argument("--batch", type=int, default=1, help="the most requests in one batch")
    parser.add_argument("--batch-wait-ms", type=int, default=1, help="how long a batch may fill")
    parser.add_argument("--front", type=int, default=1, help="processes that speak HTTP")
    parser.add_argument("--decoders", type=int, default=0, help="processes that decode alone")
    return parser.parse_known_args()[0]
