"""The store: a plan, committed shards, manifests of them, and the checks that hold them together."""
