"""The ``actvar`` command."""
