"""From URLs or images to what training reads: downloads, tars, selections, caches, an index."""
