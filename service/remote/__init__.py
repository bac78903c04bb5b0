"""Gateways and workers that meet in Redis, and what gateways share there."""
