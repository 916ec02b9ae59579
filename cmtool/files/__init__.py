"""Files whatever they contain: atomic writing, downloads, the cache, archives, and pickles that are never run."""
