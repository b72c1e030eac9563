"""The front door: text in, text out. Tokenises, chooses workers, journals, relays and recovers."""
