"""What atoms do: erased, written where they are silent, amplified, and who reads them."""
