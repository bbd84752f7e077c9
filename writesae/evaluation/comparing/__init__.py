"""What a dictionary is held against: other dictionaries, other baselines, other objectives, at one budget."""
