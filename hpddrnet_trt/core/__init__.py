"""What everything stands on: errors, files, the manifest, metrics, text."""
