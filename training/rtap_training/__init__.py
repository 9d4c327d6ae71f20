"""Training of what the server loads: policies and confidence generators.

Imports ``rtap_core`` (the shared trajectory contract) and nothing else of the server.
"""
