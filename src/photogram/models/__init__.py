"""What is known of each pipeline family: cards, defaults, and the few facts that shapes do not tell."""
