"""ultralytics."""
