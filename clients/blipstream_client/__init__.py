"""Python client for a Blipstream server."""
