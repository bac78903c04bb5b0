"""The serving half of Clarifier: HTTP in, defended answers out."""
