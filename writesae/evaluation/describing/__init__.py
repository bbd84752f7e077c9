"""What atoms are: like a write or not, where they fire, what memories rebuilt from them cost."""
