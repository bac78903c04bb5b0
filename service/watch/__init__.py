"""The attack watch: what traffic says about attacks, found out beside the answers."""
