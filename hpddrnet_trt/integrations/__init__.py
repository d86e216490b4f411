"""Acquisition software and viewers that feed the runner; each module needs the extra of its name."""
