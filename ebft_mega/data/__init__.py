"""Raw text to fixed-length rows of tokens: tokenizers, shards, order, packing, stream and loader."""
