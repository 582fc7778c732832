"""Folders that `sfumato prepare` wrote: their format, and readers of their tars and caches."""
