"""Rim towards scoring models: a reward family per file, and the weighted sum."""
