"""The page of `logitstore report`: a store, what its teacher said about the text, and who else said something."""
