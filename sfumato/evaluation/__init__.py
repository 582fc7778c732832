"""Scores and diversity of images, and the commands that make and measure them."""
