"""Documents of a corpus, the plan that cuts them into work units, and the sequences made of them."""
