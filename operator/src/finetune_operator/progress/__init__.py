"""The HTTPS endpoint to which running stages post how far they are. Best effort: nothing depends on it."""
