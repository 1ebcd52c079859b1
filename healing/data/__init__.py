"""Clean text: corpora, disjoint splits, packed windows; files from the Hugging Face Hub."""
