"""Records in an order that is a pure function of store, seed and step, for any number of ranks."""
