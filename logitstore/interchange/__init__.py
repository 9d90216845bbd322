"""Data sets of other distillation tools, in and out: their layouts, and stores made from and into them."""
