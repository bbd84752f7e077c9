"""Other people's formats: the paper's published files, the Hugging Face hub, SAELens."""
