"""The bench itself: a registry of suites, one runner, timing, rows, reports and plots."""
