"""Episodes: where they come from, how they are kept, what is drawn from them."""
