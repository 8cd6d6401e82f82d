"""A load generator for servers that answer questions about images: ``blipstream bench``.

Workload and load know nothing of protocols, protocols nothing of figures; each module's docstring says what it owns.
"""
