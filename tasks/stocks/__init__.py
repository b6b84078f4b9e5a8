"""MIGA: tomorrow's ranking of stocks by groups of linear experts that a cross-section encoder routes to."""
