"""The report: one HTML page that compares run folders."""
