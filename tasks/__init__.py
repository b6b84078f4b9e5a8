"""The applications, one package each."""
