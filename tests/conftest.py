"""How Hypothesis runs: what takes a busy machine long is no fault of what is tested."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

TOO_SLOW = [HealthCheck.too_slow]
settings.register_profile("any-machine", deadline=None, suppress_health_check=TOO_SLOW)
settings.load_profile("any-machine")
