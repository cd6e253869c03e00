"""Feature maps: one file each, called as `ebft.embed_method` calls them."""
