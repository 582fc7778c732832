"""Report: one HTML page that compares run folders."""
