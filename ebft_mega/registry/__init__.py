"""Tables of the entries that a configuration can name, and the plugins that add to them."""
