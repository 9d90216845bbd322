"""Teachers: models that say what they think comes next, and what is kept of it."""
