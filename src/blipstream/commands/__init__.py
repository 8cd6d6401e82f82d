"""The command line, one module a command; importing one is cheap."""
