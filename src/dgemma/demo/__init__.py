"""The small demo model that comes with the package: its tokenizer, chat template and weights."""
