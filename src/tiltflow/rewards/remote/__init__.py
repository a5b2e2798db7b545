"""Rewards in another process: the wire, the client, the server, and the gate before it."""
