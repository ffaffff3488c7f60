"""Models: where one lies, its configuration, tokenizer and weights, and what identifies it."""
