"""How the client's gradient is computed fast."""
