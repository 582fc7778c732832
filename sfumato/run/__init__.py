"""Assembly of a run: the core meets data, preparation and networks from elsewhere."""
