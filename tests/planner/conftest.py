"""Property tests of the planner take their time on a busy machine; only pytest's own timeout ends them."""

from hypothesis import HealthCheck, settings

settings.register_profile("planner", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("planner")
