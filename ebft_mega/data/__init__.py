"""Raw text to fixed-length rows of tokens, in four rooms: text, store, builder, rows."""
