"""Demo: a tiny world of captioned shapes, its models and its experiment."""
