"""Semantic IDs: tokenizers that make them, the table that keeps them, the prefix trie that walks them."""
