"""The services and the structs of inference.thrift, as Thrift's clients in tests know them."""

from __future__ import annotations

from typing import Any

import thriftpy2

from tests.serve.server import ROOT

IDL: Any = thriftpy2.load(str(ROOT / "flowlang/serve/inference.thrift"), "inference_tests_thrift")
