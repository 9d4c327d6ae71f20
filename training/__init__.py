"""Training of what the server loads: policies and confidence generators.

Imports ``server.rtap`` (the shared trajectory contract) and nothing else of the server.
"""
