"""The client: its model, what it computes and shares, and how it defends itself."""
