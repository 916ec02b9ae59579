"""Files whatever they contain: atomic writing, downloads, the cache, and pickles read without running them."""
