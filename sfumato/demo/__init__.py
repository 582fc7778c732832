"""Demo: a small model of emoji, its rebuild and its experiment."""
