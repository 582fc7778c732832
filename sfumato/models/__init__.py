"""Rim towards diffusers, transformers and peft: a published model family per file."""
