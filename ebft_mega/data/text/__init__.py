"""Text as people bring it: files, archives, compression, tokenizers."""
