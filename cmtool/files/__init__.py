"""Files as such, whatever they hold: writing them whole, fetching them once, keeping them in the cache."""
