"""Costs of a training recipe, counted on networks without memory."""
