"""What stands in a write's place: the replacement test, of one cell or all, atom by atom, over whole passages."""
