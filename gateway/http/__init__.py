"""OpenAI's HTTP API in front of the gateway's desk."""
