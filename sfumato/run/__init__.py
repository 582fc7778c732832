"""A whole run: where the core meets data, preparation and networks from elsewhere."""
