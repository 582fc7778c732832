"""The mathematics: process, sampling, guidance."""
