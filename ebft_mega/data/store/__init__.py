"""A dataset of checksummed shards, on a disk or behind https, and how it is read and checked."""
